"""launch/train.py --fit on a CPU, and what it says of GPUs.

Not covered here: a GPU's memory, and that the planner's figures are like it.
"""

import re
from types import SimpleNamespace

import pytest
import torch

from grpo_mcore.config import file as config_file
from grpo_mcore.data import arithmetic
from grpo_mcore.plan import fit, memory, time as plan_time
from tests.conftest import CONFIG
from tests.dist import ROOT
from tests.test_trainer import train

NODE = memory.Machine("h100-80gb", 8)


def preset(*overrides: str):
    return config_file.load(str(ROOT / "configs/deepscaler_8k.yaml"), list(overrides))


@pytest.mark.slow
def test_a_worst_step_goes_through_every_phase_and_leaves_nothing(tmp_path):
    arithmetic.make_model(tmp_path / "model", seed=0)
    cfg = tmp_path / "cfg.yaml"
    text = CONFIG.format(model=tmp_path / "model", run_dir=tmp_path / "run")
    cfg.write_text("".join(line for line in text.splitlines(keepends=True) if "warm_start" not in line))
    out = train(cfg, "--fit", "optimizer.lr=1e-9", ranks=2, timeout_s=600)
    # 4 prompts x 4 responses x 40 tokens: an untaught model, to which any token is likely, would else have ended most
    # of them.
    assert "4 of 4 groups of 4 responses were done within 60 s, 640 tokens" in out
    form = r"^  (\w+) +([\d.]+) s, resident ([\d.]+) GB(, the first time [\d.]+ s)?$"
    seen = re.findall(form, out, re.MULTILINE)
    assert [phase for phase, *_ in seen] == ["build", "refit", "logprob", "update", "rollout"]
    assert [phase for phase, *_, first in seen if first] == ["refit", "logprob", "update"]
    assert all(float(gb) > 0.1 for _, _, gb, _ in seen) and float(seen[0][1]) > 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cfg.yaml", "model"]


def test_sequences_are_as_long_as_training_allows_and_fill_a_global_batch():
    cfg = preset(
        "rollout.max_total_tokens=32",
        "rollout.group_size=6",
        "rollout.prompts_per_step=32",
        "data.max_prompt_tokens=31",
    )
    groups = fit.synthetic_groups(cfg, vocab_size=91)
    assert len(groups) * 6 % cfg.batch.global_batch_size == 0 and len(groups) == 32  # lcm(6, 64) = 192
    assert {len(g.prompt.token_ids) + len(r.token_ids) for g in groups for r in g.responses} == {32} and len(
        groups[0].responses
    ) == 6
    assert groups == fit.synthetic_groups(cfg, vocab_size=91)  # every rank makes its own
    assert fit.greatest(
        preset("rollout.max_total_tokens=null", "rollout.max_response_tokens=100", "data.max_prompt_tokens=20")
    ) == (20, 100)


def test_what_does_not_fit_is_said_with_its_phase_and_the_planners_smallest_change():
    cfg = preset("parallel.recompute=none", "batch.max_tokens_per_microbatch=65536")
    said = fit.explain(cfg, "update", torch.OutOfMemoryError("CUDA out of memory."), NODE)
    change = memory.smallest_change(memory.Case(cfg, memory.hf_config_of(cfg), NODE))
    assert said == f"update does not fit: CUDA out of memory. Remedy: {memory.overrides(change)}" and "=" in said


def test_out_of_memory_in_a_phase_is_an_error_of_that_phase():
    phases = fit.Phases(preset("device=auto"))
    with pytest.raises(fit.entry.DoesNotFit, match="logprob does not fit: CUDA out of memory"), phases("logprob"):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    assert phases.measured == {}


def test_a_phase_that_comes_again_counts_by_its_last_time(monkeypatch):
    """The first update compiles its kernels: what a step takes is what the second takes."""
    clock = iter([0.0, 90.0, 100.0, 107.0, 200.0, 203.0])
    monkeypatch.setattr(fit, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    cfg = preset("device=auto")
    phases = fit.Phases(cfg)
    for name in ("update", "update", "rollout"):
        with phases(name):
            pass
    assert phases.measured["update"]["seconds"] == 7.0 and phases.measured["update"]["first"] == 90.0
    update, rollout = fit.report(cfg, [phases.measured], None).splitlines()[1:]
    assert "7.0 s, resident" in update and update.endswith(", the first time 90.0 s")
    assert "3.0 s, resident" in rollout and "first" not in rollout


def test_the_seconds_beside_an_update_are_those_foretold_of_one_update():
    cfg = preset()
    (update,) = fit.report(cfg, [{"update": {"seconds": 1.0}}], NODE).splitlines()[1:]
    case = memory.Case(cfg, memory.hf_config_of(cfg), NODE)
    step = plan_time.times(case, plan_time.Assumptions(*map(float, fit.greatest(cfg))))["update"]
    assert f"({step / cfg.optimizer_steps_per_step:.1f} s, in use" in update


def test_the_report_has_the_worst_rank_and_stands_beside_the_plan():
    cfg = preset()
    measured = {phase: {"seconds": 1.0, "allocated": 5e9} for phase in ("logprob", "update", "rollout", "refit")}
    lines = fit.report(cfg, [measured, {**measured, "update": {"seconds": 7.0, "allocated": 9e9}}], NODE).splitlines()
    (update,) = [line for line in lines if "update" in line]
    total = memory.needed(memory.Case(cfg, memory.hf_config_of(cfg), NODE)).total("update")
    assert "7.0 s, allocated 9.00 GB" in update and f"in use {total / 1e9:.2f} GB)" in update
