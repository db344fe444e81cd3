"""benchmarks/engine_deaths.py: two deaths. Not covered here: that it would see a response that is lost."""

import pytest

from tests.benchmarks.program import report_of


@pytest.mark.slow
def test_two_deaths_lose_nothing_and_change_nothing(untaught, tmp_path):
    # An untaught model is never right: what moves its weights is the entropy's gradient.
    model = [f"model={untaught}", "warm_start=null", "loss.entropy_coef=0.01"]
    report = report_of("engine_deaths", "--deaths", 2, "--steps", 3, *model, out=tmp_path / "out.json", timeout_s=600)
    assert len(report["deaths"]) == 2 and report["engine_failures"] >= 1
    assert report["responses"] == report["graded_responses"] == 3 * 32 * 8
    assert report["responses_lost"] == report["responses_twice"] == 0
    assert report["rollouts_equal"] and report["weights_equal"] and report["metrics_equal"]
