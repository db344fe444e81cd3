import os

# Before torch is imported, here and in every child.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import pytest
import torch

from tests import models

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory) -> dict[str, str]:
    """A tiny Hugging Face folder, random weights, of every family and kind of `tests.models.KINDS`."""
    root = tmp_path_factory.mktemp("models")
    return {kind: models.make(kind, root / kind) for kind in models.KINDS}
