"""The user's first command: a published recipe's own file, with the model and the data sets from the hub.

A tiny model and a few problems stand under the published names on a stand-in for the hub, and the sizes are a CPU's.
Not covered here: the real model and data, GPUs, and what the recipe's quantities are (tests/config/test_recipe.py).
"""

import json
import subprocess
import sys

import pytest

from grpo_mcore.checkpoint import checkpoint
from grpo_mcore.data import arithmetic
from grpo_mcore.report import run_folder
from tests.dist import ROOT, cores, environment
from tests.hub import Hub

# What docs/tasks.md says that a CPU needs, and then what makes a step short.
ON_A_CPU = ("device=cpu", "engine.num_engines=1", "engine.kv_cache_bytes=67108864")
SHORT = (
    "num_steps=1",
    "data.max_prompt_tokens=240",
    "rollout.max_total_tokens=256",
    "rollout.prompts_per_step=4",
    "batch.global_batch_size=16",
    "eval.samples_per_prompt=2",
    "checkpoint.best_metric=eval/mean@2",
    "reward.num_processes=2",
)


@pytest.mark.slow
def test_the_8k_recipe_goes_from_an_empty_hub_cache_to_its_first_checkpoint(tmp_path):
    served = tmp_path / "hub"
    model = served / "models/deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    arithmetic.make_model(model, seed=0)
    (model / "chat_template.jinja").write_text("{{ messages[0]['content'] }}<think>")
    train, test = (arithmetic.rows(f"two_digit_sums/{split}")[:8] for split in ("train", "heldout"))
    for name, rows in (
        ("agentica-org/DeepScaleR-Preview-Dataset/deepscaler.json", train),
        ("HuggingFaceH4/aime_2024/train.json", test[:2]),
    ):
        path = served / "datasets" / name
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps([{"problem": problem, "answer": answer} for problem, answer in rows]))
    with Hub(served).serve() as hub, cores():
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        done = subprocess.run(
            [*torchrun, ROOT / "launch/train.py", "--cfg", ROOT / "configs/deepscaler_8k.yaml", *ON_A_CPU, *SHORT],
            cwd=tmp_path,
            env=environment(**hub.environment(tmp_path / "home")),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
    assert done.returncode == 0, done.stdout[-6000:]
    assert done.stdout.count("it is fetched from the hub") == 1
    assert all(n == 1 for path, n in hub.fetched.items() if "DeepSeek" in path and n)
    run_dir = tmp_path / "runs/deepscaler_8k"
    saved = checkpoint.published(run_dir)[0]
    assert checkpoint.progress_of(saved).step == 1
    assert (saved / checkpoint.HF / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    before, step, after = run_folder.read_metrics(run_dir)
    assert "eval/mean@2" in before and "eval/mean@2" in after and step["rollout/response_tokens_mean"] > 1
