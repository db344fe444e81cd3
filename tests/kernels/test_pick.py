"""Which form of a kernel runs, and that the choice is said once. Not covered here: what it is on CUDA."""

import subprocess
import sys

import pytest
import torch

from grpo_mcore.kernels import linear_grpo, pick, reference
from tests.dist import ROOT, environment

CPU = torch.device("cpu")


def test_on_a_cpu_auto_is_the_reference(capsys):
    pick._say.cache_clear()
    for _ in range(2):
        assert pick.pick("auto", CPU) is reference.linear_logprob
    assert pick.pick("reference", CPU) is reference.linear_logprob
    assert capsys.readouterr().out.splitlines() == [
        "kernels: linear_logprob is reference's (the tensors are on cpu)",
        "kernels: linear_logprob is reference's (as asked)",
    ]


@pytest.mark.parametrize(
    "asked, words",
    [
        ({}, "once (linear_grpo)"),
        ({"wanted": False}, "twice (kernels.linear_grpo = false)"),
        ({"pointwise": False}, "twice (the loss of a token needs its whole response, as gspo's does)"),
    ],
)
def test_an_update_computes_its_logits_once_where_it_can_and_says_why_not(capsys, asked, words):
    pick._say.cache_clear()
    for _ in range(2):
        picked = pick.pick_grpo("auto", CPU, 99, **{"wanted": True, "pointwise": True, **asked})
        assert (picked is None) == bool(asked)
    said = [f"kernels: an update computes its logits {words}"]
    if picked is not None:
        assert picked.func is linear_grpo.linear_grpo
        assert picked.keywords == {"logits": linear_grpo.Logits, "workspace_bytes": 99}
        said.append("kernels: linear_grpo is reference's (the tensors are on cpu)")
    assert capsys.readouterr().out.splitlines() == said


@pytest.mark.parametrize(
    "impl, words",
    [
        ("triton", "the tensors are on cpu.*Remedy: impl = auto or reference"),
        ("cuda", "must be one of auto, reference, triton"),
    ],
)
def test_what_cannot_run_is_refused(monkeypatch, impl, words):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    pick._what_triton_lacks.cache_clear()
    with pytest.raises(ValueError, match=words):
        pick.pick(impl, CPU)


def test_triton_is_imported_only_where_it_is_picked():
    pytest.importorskip("triton")
    program = """
import sys
from grpo_mcore.kernels.pick import pick
import torch
pick("auto", torch.device("cpu"))
assert "triton" not in sys.modules
picked = pick("triton", torch.device("cpu"))
assert "triton" in sys.modules and picked.__module__ == "grpo_mcore.kernels.linear_logprob"
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment(TRITON_INTERPRET="1"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
