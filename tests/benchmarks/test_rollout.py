"""benchmarks/rollout.py with one engine. What it concludes from its seconds: tests/plan/test_cluster.py.

Not covered here: GPUs, several engines.
"""

import pytest

from grpo_mcore.plan import cluster
from tests.benchmarks.program import report_of


@pytest.mark.slow
def test_the_benchmark_of_a_real_engine(tmp_path):
    out = tmp_path / "out.json"
    size = ["--cfg", "configs/quickstart.yaml", "--running", "1,8", "--load", 16, "--rounds", 1]
    report = report_of("rollout", *size, "engine.num_engines=1", out=out, timeout_s=400)
    assert (
        cluster.engine_from(out).iteration_s[1][0] == 8
        and report["load"]["responses"] == 16
        and report["load"]["s"] > 0
        and report["load"]["simulated_s"] > 0
    )
    assert report["prefix_cache"]["prompt_tokens"] == 8 and all(
        s > 0 for s in report["seconds"]["8 running, 40 tokens"]
    )
