"""What all tests have: an environment that stands before torch is imported, models, a configuration."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.dist import environment


def wants_gpus(markers: str) -> bool:
    """Whether `pytest -m MARKERS` runs tests of `gpu` alone: all others are of a CPU, and are to see no GPU."""
    return re.match(r"\s*gpu\b(?!\s+or\b)", markers) is not None


def pytest_configure(config):
    # Before torch is imported, here and in every child.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ["PYTHONPATH"] = str(Path(__file__).parent.parent)
    if not wants_gpus(config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    assert "torch" not in sys.modules, "a conftest.py imports torch, whose environment only stands now: in its fixtures"
    import torch

    torch.set_num_threads(1)


# The longest of the slow files first: none of them is left to run alone at the end.
LONGEST = ("test_stages.py", "test_slurm.py", "test_engines.py", "test_trainer.py", "test_rollout.py", "test_refit.py")


def pytest_collection_modifyitems(items):
    import torch

    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs CUDA, and pytest -m gpu"))


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory) -> dict[str, str]:
    """A tiny Hugging Face folder, random weights, of every family and kind of `tests.models.KINDS`."""
    from tests import models

    root = tmp_path_factory.mktemp("models")
    return {kind: models.make(kind, root / kind) for kind in models.KINDS}


# A whole run in half a minute: two steps of it are two optimizer steps each.
CONFIG = """
model: {model}
run_dir: {run_dir}
num_steps: 4
seed: 3
device: cpu
data:
  train: "arithmetic:two_digit_sums/train"
  prompt_template: "{{problem}}="
  chat_template: false
  max_prompt_tokens: 8
precision: {{params: float32}}
optimizer: {{lr: 1e-3}}
warm_start: {{task: two_digit_sums, stop_at_pass_rate: 0.25}}
rollout: {{prompts_per_step: 4, group_size: 4, max_response_tokens: 40, timeout_s: 120}}
engine: {{num_engines: 1, dtype: float32, kv_cache_bytes: 33554432}}
loss: {{kl_coef: 0.01}}
batch: {{global_batch_size: 8, max_tokens_per_microbatch: 128}}
eval: {{data: "arithmetic:two_digit_sums/heldout", every: 2, max_prompts: 8, samples_per_prompt: 2}}
checkpoint: {{every: 1}}
"""


@pytest.fixture(scope="session")
def taught(tmp_path_factory) -> Path:
    """A model that is right now and then: without it rewards are all 0, and with them every gradient."""
    folder = tmp_path_factory.mktemp("taught")
    path = folder / "cfg.yaml"
    path.write_text(CONFIG.format(model=folder / "model", run_dir=folder / "run"))
    subprocess.run(
        [sys.executable, "-m", "grpo_mcore.policy.warm_start", str(path)],
        cwd=folder,
        env=environment(),
        check=True,
        timeout=300,
    )
    return folder / "model"
