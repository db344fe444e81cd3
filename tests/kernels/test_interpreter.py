"""The tests of the Triton kernels where there is no GPU: by Triton's interpreter, in a process of its own, for
TRITON_INTERPRET must be set before triton is imported, and would then hold for all that import it."""

import importlib.util
import subprocess
import sys

import pytest
import torch

from tests.dist import ROOT, environment

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or importlib.util.find_spec("triton") is None,
    reason="the kernels run on the GPU, or triton is missing",
)


def test_the_triton_kernels_hold_under_the_interpreter():
    files = "tests/kernels/test_linear_logprob.py", "tests/kernels/test_linear_grpo_triton.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(TRITON_INTERPRET="1"), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-5000:] + done.stderr[-2000:]
