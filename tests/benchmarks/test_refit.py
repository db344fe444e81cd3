"""benchmarks/refit.py on a tiny model. Not covered here: CUDA, --transport broadcast, several ranks and engines."""

import pytest
from safetensors.torch import load_file

from tests.benchmarks.program import report_of


@pytest.mark.slow
def test_all_weights_are_sent_and_every_phase_is_timed(untaught, tmp_path):
    size = ["--model", untaught, "--dtype", "float32", "--repeats", 1, "--warmup", 1]
    report = report_of("refit", *size, "device=cpu", out=tmp_path / "out.json", timeout_s=400)
    assert report["transport"] == "shared_memory" and report["engines"] == report["repeats"] == 1
    assert report["bytes"] == sum(w.nbytes for w in load_file(untaught / "model.safetensors").values())
    assert report["buckets"] >= report["bytes"] / report["bucket_bytes"]
    phases = report["phases"]
    assert set(phases) == {*("memcpy", "refit", "with_canary", "begin", "loading", "end", "fill", "load", "repack")}
    assert all(p["min_s"] == p["median_s"] >= 0 for p in phases.values())  # of one
    assert phases["with_canary"]["median_s"] > phases["refit"]["median_s"] > phases["loading"]["median_s"]
    # Seconds are rounded to 0.01 ms.
    assert phases["refit"]["gb_per_s_of_median"] == pytest.approx(
        report["bytes"] / 1e9 / phases["refit"]["median_s"], rel=0.05, abs=0.01
    )
    assert report["canary_abs_mean_max"] < 1e-4, "the engine scores with the weights that were sent"
