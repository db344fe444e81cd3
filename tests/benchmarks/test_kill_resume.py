"""benchmarks/kill_resume.py: one kill. Not covered here: more than one process."""

import re

import pytest

from tests.benchmarks.program import report_of


@pytest.mark.slow
def test_one_kill_changes_neither_weights_nor_metrics(untaught, tmp_path):
    # An untaught model is never right: what moves its weights is the entropy's gradient.
    model = [f"model={untaught}", "warm_start=null", "loss.entropy_coef=0.01"]
    report = report_of("kill_resume", "--kills", 1, "--steps", 3, *model, out=tmp_path / "out.json", timeout_s=600)
    (kill,) = report["kills"]
    assert kill["steps_before"] == 0 and 1 <= kill["steps_reached"] <= report["steps"] == 3 and kill["newest"]
    assert report["weights_equal"] and report["metrics_equal"]
    assert report["digest_killed"] == report["digest_uninterrupted"]
    assert re.fullmatch("[0-9a-f]{64}", report["digest_killed"])
