from pathlib import Path

import pytest

from grpo_mcore.config import file as config_file
from tests.dist import ROOT


@pytest.fixture(scope="session")
def untaught(tmp_path_factory) -> Path:
    """The quickstart's model with random weights: enough where no reward is asked for."""
    from grpo_mcore.data import arithmetic

    folder = tmp_path_factory.mktemp("untaught")
    arithmetic.make_model(folder, seed=1)
    return folder


@pytest.fixture(scope="session")
def recipe(untaught, tmp_path_factory) -> Path:
    """A small step of the quickstart: 4 prompts x 4 responses, two optimizer steps."""
    overrides = [
        f"model={untaught}",
        "warm_start=null",
        "eval.data=null",
        "num_steps=2",
        "rollout.prompts_per_step=4",
        "rollout.group_size=4",
        "batch.global_batch_size=8",
        "engine.num_engines=1",
    ]
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(config_file.to_yaml(config_file.load(ROOT / "configs/quickstart.yaml", overrides)))
    return path
