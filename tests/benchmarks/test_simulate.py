"""benchmarks/simulate.py: a real run, simulated beside it.

Not covered here: whether both agree, which depends on what else the machine does (benchmarks/results/simulate.json).
"""

import statistics

import pytest

from grpo_mcore.plan import cluster
from tests.benchmarks.program import report_of


@pytest.mark.slow
def test_a_real_run_is_simulated_beside_it(recipe, tmp_path):
    """Whether both agree is not asked here: that depends on what else the machine does."""
    size = ["--cfg", recipe, "--running", "1,8", "--run-dir", tmp_path / "run", "num_steps=3"]
    report = report_of("simulate", *size, out=tmp_path / "out.json", timeout_s=400)
    assert len(report["steps"]) == 2 and all(
        s["measured_rollout_s"] > 0 and s["predicted_rollout_s"] > 0 for s in report["steps"]
    )
    steps = cluster.measured_steps(tmp_path / "run")
    assert report["measured"]["step_s"]["measured"] == pytest.approx(statistics.mean(s.seconds for s in steps[1:]))
    assert report["measured"]["train_s"]["predicted"] == pytest.approx(report["measured"]["train_s"]["measured"]), (
        "the same lengths, of which the seconds were taken"
    )
    assert [len(s) for s in report["seconds"].values()] == [2] * len(report["seconds"]), "one round a step"
