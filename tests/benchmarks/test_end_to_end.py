"""benchmarks/end_to_end.py, and trl_peer.py beside it where TRL is installed: a step that counts, after one that does
not.

Not covered here: --ahead, several recipes.
"""

import importlib.util

import pytest

from benchmarks.end_to_end import Step, figures
from tests.benchmarks.program import report_of

HAS_TRL = importlib.util.find_spec("trl") is not None
PROMPT_TOKENS, RESPONSES, MAX_RESPONSE_TOKENS = 6, 16, 40  # "12+34=", a token a character


@pytest.fixture(scope="module")
def report(recipe, tmp_path_factory) -> dict:
    """One run for both."""
    out = tmp_path_factory.mktemp("end_to_end") / "out.json"
    peer = ["--peer", "trl", "--peer-threads", "1"] if HAS_TRL else []
    return report_of("end_to_end", "--recipes", recipe, "--steps", 1, "--warmup", 1, *peer, out=out, timeout_s=600)


def check(f: dict) -> None:
    """Of a program's figures: what was sampled, and that rates are tokens over seconds."""
    assert f["num_steps"] == 1 and f["overrides"][:3] == ["eval.data=null", "checkpoint.every=0", "num_steps=2"]
    assert RESPONSES <= f["response_tokens"] <= RESPONSES * MAX_RESPONSE_TOKENS
    assert f["packed_tokens"] == pytest.approx(f["response_tokens"] + RESPONSES * PROMPT_TOKENS, abs=0.01)
    assert f["cpu_s"] > 0 and all(f[f"{phase}_s"] > 0 for phase in ("step", "rollout", "update"))
    assert f["steps_per_s"] == pytest.approx(1 / f["step_s"], rel=1e-2, abs=1e-4)
    for kind in ("response", "packed"):
        assert f[f"{kind}_tokens_per_s"] * f["step_s"] == pytest.approx(f[f"{kind}_tokens"], rel=1e-2)
    assert f["reward_mean"] == 0  # random weights box no answer


def test_a_checkpoints_seconds_are_not_those_in_which_tokens_were_trained_on():
    # 600 tokens in 2 + 1 s; the checkpoint's 5 s are no part of the trainer's rate, but of the step.
    row = {"time/rollout_s": 2.0, "time/update_s": 1.0, "time/checkpoint_s": 5.0, "tokens_per_s": 200.0}
    row |= {"rollout/response_tokens_mean": 25.0, "reward/mean": 0.5}
    f = figures(Step({}, 10.0, 1.0), Step(row, 20.0, 9.0), responses_per_step=16)
    assert (f["packed_tokens"], f["packed_tokens_per_s"], f["response_tokens"]) == (600, 60, 400)
    assert (f["step_s"], f["cpu_s"], f["response_tokens_per_cpu_s"]) == (10, 8, 50)


@pytest.mark.slow
def test_a_step_of_a_run_is_measured_by_phase_and_in_tokens(report):
    (r,) = report["results"]
    check(r["grpo_mcore"])
    assert all(r["grpo_mcore"][f"{phase}_s"] > 0 for phase in ("refit", "logprob"))


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRL, reason='TRL is not installed: pip install -e ".[peers]"')
def test_trl_trains_on_as_many_prompt_tokens(report):
    (r,) = report["results"]
    check(r["trl"])
    assert "trl" in report["versions"]
    for name, ratio in r["ours_over_peer"].items():
        assert ratio == pytest.approx(r["grpo_mcore"][name] / r["trl"][name], abs=6e-4)
