"""The presets against the publications: what they say is restated here, number by number, apart from the package's own
table.

Not covered here: that training with them reaches the published accuracy.
"""

from pathlib import Path

import pytest

from grpo_mcore.config import recipe
from grpo_mcore.config.config import InputError
from grpo_mcore.config.file import load
from tests.dist import ROOT, program

CONFIGS = ROOT / "configs"
PRESETS = sorted(CONFIGS.rglob("deepscaler_*.yaml"))
STAGES = ("8k", "16k", "24k")

# Key -> the publication's value of each stage.
GUIDE = {
    "rollout.prompts_per_step": (128, 128, 128),
    "rollout.group_size": (8, 8, 8),
    "batch.global_batch_size": (64, 64, 64),
    "num_steps": (240, 290, 50),
    "optimizer.lr": (2e-6, 2e-6, 5e-7),
    "optimizer.warmup_steps": (50, 50, 50),
    "optimizer.warmup_start_frac": (0.1, 0.1, 0.1),
    "optimizer.weight_decay": (0.01, 0.01, 0.01),
    "optimizer.decay": ("all",) * 3,
    "optimizer.clip_grad": (1.0, 1.0, 1.0),
    "optimizer.eps": (1e-8, 1e-8, 1e-8),
    "optimizer.beta1": (0.9, 0.9, 0.9),
    "optimizer.beta2": (0.999, 0.999, 0.999),
    "loss.kl_coef": (0.0, 0.001, 0.0001),
    "loss.clip_low": (0.2, 0.2, 0.2),
    "loss.clip_high": (0.2, 0.28, 0.28),
    "rollout.max_total_tokens": (8192, 16384, 24576),
    "rollout.temperature": (1.0, 1.0, 1.0),
    "eval.temperature": (1.0, 1.0, 1.0),
    "eval.top_p": (1.0, 1.0, 1.0),
    "eval.samples_per_prompt": (16, 16, 16),
    "eval.every": (10, 10, 10),
    "checkpoint.every": (10, 10, 10),
    "checkpoint.keep_best": (10, 10, 10),
    "checkpoint.best_metric": ("eval/mean@16",) * 3,
    "advantage.baseline": ("leave_one_out",) * 3,
    "data.overlong_prompts": ("mask",) * 3,
    "parallel.tp": (1, 2, 2),
    "seed": (42, 42, 42),
}
ORIGINAL = {
    "rollout.prompts_per_step": (128, 128, 128),
    "rollout.group_size": (8, 16, 16),
    "batch.global_batch_size": (512, 1024, 1024),
    "num_steps": (1040, 480, 230),
    "optimizer.lr": (1e-6, 1e-6, 1e-6),
    "optimizer.decay": ("all",) * 3,
    "optimizer.warmup_steps": (0, 0, 0),
    "loss.kl_coef": (0.001, 0.001, 0.001),
    "loss.clip_low": (0.2, 0.2, 0.2),
    "loss.clip_high": (0.2, 0.2, 0.2),
    "rollout.max_total_tokens": ("none",) * 3,
    "rollout.max_response_tokens": (8192, 16384, 24576),
    "data.max_prompt_tokens": (1024, 1024, 1024),
    "rollout.temperature": (0.6, 0.6, 0.6),
    "eval.temperature": (0.6, 0.6, 0.6),
    "eval.samples_per_prompt": (8, 16, 16),
    "eval.every": (20, 10, 10),
    "checkpoint.every": (20, 10, 10),
    "advantage.baseline": ("mean",) * 3,
    "data.overlong_prompts": ("filter",) * 3,
}


@pytest.mark.parametrize("folder, published", [("", GUIDE), ("original", ORIGINAL)], ids=["guide", "original"])
def test_presets_say_what_their_publication_says(folder, published):
    for index, stage in enumerate(STAGES):
        cfg = load(CONFIGS / folder / f"deepscaler_{stage}.yaml")
        for dotted, values in published.items():
            assert recipe.key(dotted)(cfg) == values[index], (stage, dotted)
        assert cfg.eval.max_response_tokens is None and cfg.rollout.max_response_tokens == (8192, 16384, 24576)[index]
        assert (
            cfg.advantage.normalize_by_std
            and cfg.loss.kl_estimator == "k3"
            and cfg.loss.aggregation == "token_mean"
            and cfg.data.chat_template
        )


def test_the_prompts_are_those_of_the_publications_byte_by_byte():
    guide = (
        b"Think step-by-step to solve the following problem. Output your answer inside of \x5c\x5cboxed{} "
        b"tags.:\x0a{problem}\x0a\x0aLet's think step-by-step"
    )
    original = b"{problem} Let's think step by step and output the final answer within \x5cboxed{}."
    for path in PRESETS:
        assert load(path).data.prompt_template.encode() == (original if path.parent.name == "original" else guide), path


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_a_preset_deviates_exactly_where_it_declares_it(path):
    cfg = load(path)
    assert cfg.recipe == f"{'original' if path.parent.name == 'original' else 'guide'}/{path.stem.split('_')[1]}"
    assert sorted(recipe.deviations(cfg)) == sorted(cfg.recipe_deviations)
    assert "DEVIATES " not in recipe.describe(cfg)


def test_a_later_stage_takes_up_the_prompts_where_the_former_stopped():
    for folder in ("", "original"):
        eight, sixteen, twenty_four = (load(CONFIGS / folder / f"deepscaler_{stage}.yaml") for stage in STAGES)
        taken = [cfg.num_steps * cfg.rollout.prompts_per_step for cfg in (eight, sixteen)]
        assert [cfg.data.skip_prompts for cfg in (eight, sixteen, twenty_four)] == [0, taken[0], sum(taken)]


def test_an_undeclared_deviation_is_marked_and_said_at_the_start():
    path = CONFIGS / "deepscaler_8k.yaml"
    lines = recipe.describe(load(path, ["optimizer.lr=1e-6"])).splitlines()
    assert [line.split()[1:] for line in lines if line.startswith("# DEVIATES ")] == [
        ["DEVIATES", "learning", "rate", "1e-06", "2e-06", "1e-06"]
    ]
    assert (
        recipe.summary(load(path, ["optimizer.lr=1e-6", "seed=1"]))
        == "16 optimizer steps per step of 64 responses; recipe guide/8k, deviating in learning rate, seed"
    )
    # One byte of the prompt.
    text = load(path).data.prompt_template.replace("\\\\", "\\")
    assert "user prompt" in recipe.summary(load(path, [f"data.prompt_template={text!r}"]))


def test_a_declared_deviation_must_be_a_quantity():
    with pytest.raises(
        InputError,
        match="recipe_deviations = 'learnign rate': is no quantity of the recipe. Remedy: name one of: model, ",
    ):
        recipe.summary(load(CONFIGS / "quickstart.yaml", ["recipe_deviations=[learnign rate]"]))


def test_what_follows_no_recipe_has_no_table():
    cfg = load(CONFIGS / "quickstart.yaml")
    assert recipe.describe(cfg) == "" and recipe.summary(cfg) == "2 optimizer steps per step of 128 responses"


def test_a_dry_run_needs_no_torchrun_to_show_a_layout_of_several_ranks():
    out = dry_run(CONFIGS / "deepscaler_24k.yaml")
    assert "tp 2 x cp 1 x pp 1 x dp 1 = 2 ranks; 8 engines" in out and "# recipe guide/24k" in out


def dry_run(path: Path) -> str:
    out = program("launch/train.py", "--cfg", path, "--dry-run")
    assert out.returncode == 0, out.stdout
    return out.stdout


@pytest.mark.parametrize(
    "preset, words",
    [
        ("deepscaler_8k.yaml", "16 optimizer steps per step of 64 responses"),
        ("original/deepscaler_8k.yaml", "2 optimizer steps per step of 512 responses"),
    ],
)
def test_a_dry_run_prints_the_optimizer_steps_and_both_publications(preset, words):
    (line,) = [
        line
        for line in dry_run(CONFIGS / preset).splitlines()
        if line.split()[1:3] == ["optimizer", "steps"] and "per step of" in line
    ]
    cells = [cell for cell in line.split("  ") if cell.strip()]
    assert [cell.strip() for cell in cells[2:]] == [
        words,
        "16 optimizer steps per step of 64 responses",
        "2 optimizer steps per step of 512 responses",
    ]
