"""benchmarks/gpu_acceptance.py: a step that fails or hangs costs its deadline and no more; the whole program rehearsed
on a CPU.

Not covered here: what it shows on a GPU.
"""

import os
import time
from pathlib import Path

import pytest

from benchmarks import gpu_acceptance
from benchmarks.gpu_acceptance import Bench, Failed, Step, take
from tests.benchmarks.program import report_of

HANG = "import os, signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
HANG += "print('child', subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"


@pytest.fixture
def bench(tmp_path) -> Bench:
    return Bench("cpu", tmp_path / "out")


def test_a_step_that_hangs_ends_at_its_deadline_with_all_its_processes(bench, monkeypatch):
    monkeypatch.setattr(gpu_acceptance, "STOP_S", 0.2)
    seen = take(Step(lambda b: b.run("-c", HANG), minutes=2 / 60), bench, left_s=100)
    assert seen["status"] == "timed out" and "not done after 2 s" in seen["reason"]
    child = int(seen["reason"].rpartition("child ")[2].split()[0])
    end = time.monotonic() + 10
    while Path(f"/proc/{child}/stat").exists() and Path(f"/proc/{child}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < end, f"{child} lives on"
        time.sleep(0.05)


def test_a_step_that_fails_says_its_last_words_and_what_no_time_is_left_for_is_skipped(bench):
    seen = take(Step(lambda b: b.run("-c", "print('before'); raise SystemExit('no such GPU')"), minutes=1), bench, 100)
    assert seen["status"] == "failed" and "ended with 1" in seen["reason"] and "no such GPU" in seen["reason"]
    ours = take(Step(lambda b: {}["missing"], minutes=1), bench, 100)
    assert (ours["status"], ours["reason"]) == ("failed", "KeyError: 'missing'")
    assert take(Step(lambda b: {"a": 1}, minutes=1), bench, 100)["figures"] == {"a": 1}
    late = take(Step(lambda b: {}, minutes=1), bench, left_s=3)
    assert (late["status"], late["reason"]) == ("skipped", "no time is left of --budget-min")


def test_a_program_is_waited_for_only_until_what_was_asked_for(bench):
    bench.end = time.monotonic() + 60
    process = bench.start("-c", "import time; print('ready', flush=True); time.sleep(600)")
    bench.wait(process, until=lambda: "ready" in bench.last_words().splitlines())
    assert process.poll() is None
    gpu_acceptance.kill(process)
    assert process.returncode == -9
    with pytest.raises(Failed, match="ended with 3"):
        bench.run("-c", "raise SystemExit(3)")


@pytest.mark.slow
def test_the_whole_is_rehearsed_on_a_cpu(tmp_path):
    out = tmp_path / "out.json"
    no_gpu = {"CUDA_VISIBLE_DEVICES": ""}
    report = report_of("gpu_acceptance", "--rehearse", "--budget-min", 15, out=out, timeout_s=960, **no_gpu)
    status = {step["name"]: step["status"] for step in report["steps"]}
    assert status == {step.name: "skipped" if step.on_cpu else "ok" for step in gpu_acceptance.STEPS}, report["steps"]
    figures = {step["name"]: step.get("figures") for step in report["steps"]}
    assert figures["tests"]["passed"] == 0 and figures["tests"]["skipped"]  # none runs without a GPU
    run = figures["quickstart"]
    assert run["steps when killed"] >= 4
    assert run["refit/canary_abs_mean"] < 1e-3 and run["mismatch/logprob_abs_mean"] < 1e-3
    assert "ok" in {k["status"] for k in figures["kernels"].values()}
    assert figures["train_step"].keys() == {"fp32 64", "fp32 96"}
    assert any("update" in line for line in figures["fit"]["fit"])
    assert os.path.isfile(out.with_suffix("") / "quickstart.log")
