"""Whole runs through launch/train.py, with the real Megatron, Ray and vLLM: resume, layouts, stopping, bad input.

Not covered here: that GRPO learns something worthwhile (configs/quickstart.yaml shows it); GPUs.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grpo_mcore.checkpoint import checkpoint
from grpo_mcore.config import file as config_file, metric_names
from grpo_mcore.data import arithmetic
from grpo_mcore.report import run_folder
from tests.conftest import CONFIG
from tests.dist import ROOT, environment, program

# Wall clock differs between runs, and nothing else may.
CLOCKS = ("time/", "tokens_per_s", "refit/seconds", "reward/seconds", "refit/gb_per_s")


@pytest.fixture
def untaught(tmp_path) -> Path:
    """A configuration whose model knows nothing: enough for what ends before the first step."""
    arithmetic.make_model(tmp_path / "model", seed=0)
    path = tmp_path / "cfg.yaml"
    text = CONFIG.format(model=tmp_path / "model", run_dir=tmp_path / "run")
    path.write_text("".join(line for line in text.splitlines(keepends=True) if "warm_start" not in line))
    return path


@pytest.fixture
def cfg(tmp_path, taught) -> Path:
    path = tmp_path / "cfg.yaml"
    path.write_text(CONFIG.format(model=taught, run_dir=tmp_path / "run"))
    return path


def command(cfg: Path, *overrides: str, ranks: int = 0) -> list[str]:
    launcher = (
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        if ranks
        else [sys.executable]
    )
    return [*launcher, str(ROOT / "launch/train.py"), "--cfg", str(cfg), *overrides]


def train(cfg: Path, *overrides: str, ranks: int = 0, code: int = 0, timeout_s: float = 240) -> str:
    """Runs to the end; standard output and error together."""
    done = program("launch/train.py", "--cfg", cfg, *overrides, cwd=cfg.parent, ranks=ranks, timeout_s=timeout_s)
    assert done.returncode == code, done.stdout[-4000:]
    return done.stdout


def torchrun(cfg: Path, *overrides: str, ranks: int, code: int = 0) -> str:
    """The same, from the start of Python."""
    done = subprocess.run(
        command(cfg, *overrides, ranks=ranks),
        cwd=cfg.parent,
        env=environment(),
        text=True,
        timeout=240,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == code, done.stdout[-4000:]
    return done.stdout


def rows(run_dir: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith(CLOCKS)} for row in run_folder.read_metrics(run_dir)]


def check_names(cfg: Path, run_dir: Path, *overrides: str) -> None:
    """The rows have the metrics that metric_names.py tells beforehand."""
    told = config_file.load(cfg, overrides)
    for row in run_folder.read_metrics(run_dir):
        names = metric_names.of_evaluations(told) if run_folder.is_evaluation(row) else metric_names.of_steps(told)
        seen = [name for name in row if name in names or not metric_names.is_sometimes(name)]
        assert sorted(seen) == sorted(["step", *names])


def processes_with(marker: str) -> list[str]:
    """Command lines of living processes whose environment holds `marker`."""
    out = []
    for p in Path("/proc").iterdir():
        if p.name.isdigit() and int(p.name) != os.getpid():
            try:
                if marker.encode() in (p / "environ").read_bytes():
                    out.append(f"{p.name} {(p / 'cmdline').read_bytes()[:80]}")
            except OSError:
                pass
    return out


def wait_until(condition, timeout_s: float, what) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"waited {timeout_s} s for {what()}"
        time.sleep(0.2)


def start_and_stop(cfg: Path, marker: str, when, how: int, *overrides: str, ranks: int = 0) -> tuple[int, str]:
    """Starts a run, sends it the signal `how` once `when()` holds; its exit code and output."""
    log = cfg.parent / f"{marker}.log"
    process = subprocess.Popen(
        command(cfg, "num_steps=400", *overrides, ranks=ranks),
        cwd=cfg.parent,
        env=environment(TEST_MARKER=marker),
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
    )
    try:
        wait_until(
            lambda: when() or process.poll() is not None,
            180,
            lambda: f"the run to get going; {log.read_text()[-2000:]}",
        )
        process.send_signal(how)
        process.wait(60)
    finally:
        process.kill()
    # Ray's own agents notice by polling, some 60 s later, that their cluster is gone.
    left = lambda: [p for p in processes_with(f"TEST_MARKER={marker}") if how != signal.SIGKILL or "Agent" not in p]  # noqa: E731
    wait_until(lambda: not left(), 30, lambda: f"all processes to end; there remain {left()}")
    return process.returncode, log.read_text()


def steps_done(run_dir: Path) -> int:
    return max((r["step"] for r in run_folder.read_metrics(run_dir)), default=0)


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted_and_two_layouts_agree(cfg, tmp_path):
    whole, killed = tmp_path / "run", tmp_path / "killed"
    out = train(cfg)
    assert "held-out accuracy" in out and (whole / "curves.png").stat().st_size > 5000
    assert json.loads((whole / "summary.json").read_text()).keys() == {
        "eval_before",
        "eval_after",
        "seconds",
        "curve_png",
    }
    expected = rows(whole)
    assert [r["step"] for r in expected] == [0, 1, 2, 2, 3, 4, 4]
    check_names(cfg, whole)

    # kill -9 in the middle, then the same command
    cfg.write_text(cfg.read_text().replace(str(whole), str(killed)))
    start_and_stop(cfg, "killed", lambda: len(checkpoint.published(killed)) >= 1, signal.SIGKILL)
    for late in checkpoint.published(killed)[:-1]:  # it may have come further before it died, also past num_steps
        subprocess.run(["rm", "-r", late], check=True)
    out = train(cfg)
    assert "going on from step" in out
    assert rows(killed) == expected

    # What the engine sampled with is what the trainer scores, and there is something to learn.
    first = expected[1]
    assert 0 < first["reward/mean"] < 1 and first["update/grad_norm"] > 0.01
    assert first["mismatch/logprob_abs_max"] < 1e-3 and first["mismatch/beyond_cap_frac"] == 0

    # A finished run is only summarised again.
    assert "is finished" in train(cfg)

    # The first step's metrics in other layouts are the same, up to the order of float32 sums. One optimizer step a
    # step: the first
    # step of Adam moves every weight by lr, to either side where its gradient is 0 up to rounding, and what comes after
    # it shows that.
    layouts = {
        "one": (0, []),
        "dp2": (2, []),
        "tp2": (2, ["parallel.tp=2", "parallel.sequence_parallel=true"]),
        "pp2": (2, ["parallel.pp=2"]),
        "cp2": (2, ["parallel.cp=2"]),
    }
    for name, (ranks, overrides) in layouts.items():
        train(
            cfg,
            f"run_dir={tmp_path / name}",
            "num_steps=1",
            "eval.data=null",
            "checkpoint.every=0",
            "batch.global_batch_size=16",
            *overrides,
            ranks=ranks,
        )
        (row,) = rows(tmp_path / name)
        first = row if name == "one" else first
        for key, value in first.items():
            if key not in (
                "update/microbatches",
                "update/packed_frac",
                "update/imbalance",
                "mismatch/logprob_abs_max",
                "mismatch/logprob_abs_mean",
                "mismatch/k3",
            ):
                assert row[key] == pytest.approx(value, rel=2e-4, abs=2e-6), (name, key)


@pytest.mark.slow
def test_an_engine_that_is_killed_is_replaced_and_the_run_is_the_same(cfg, tmp_path):
    train(cfg, f"run_dir={tmp_path / 'undisturbed'}")
    log = cfg.parent / "disturbed.log"
    process = subprocess.Popen(
        command(cfg),
        cwd=cfg.parent,
        env=environment(TEST_MARKER="disturbed"),
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
    )
    try:
        wait_until(lambda: steps_done(tmp_path / "run") >= 1 or process.poll() is not None, 180, log.read_text)
        # the only one
        (engine,) = [int(p.split()[0]) for p in processes_with("TEST_MARKER=disturbed") if "ray::Engine" in p]
        os.kill(engine, signal.SIGKILL)
        assert process.wait(200) == 0, log.read_text()[-3000:]
    finally:
        process.kill()
    assert "engine 0 failed" in log.read_text() and "a replacement is started" in log.read_text()
    seen = rows(tmp_path / "run")
    assert max(row.pop("rollout/engine_failures", 0) for row in seen) == 1
    assert seen == [
        {k: v for k, v in row.items() if k != "rollout/engine_failures"} for row in rows(tmp_path / "undisturbed")
    ]


@pytest.mark.slow
def test_ctrl_c_is_clean_leaves_no_process_and_says_how_to_go_on(cfg, tmp_path):
    code, out = start_and_stop(cfg, "stopped", lambda: steps_done(tmp_path / "run") >= 1, signal.SIGINT)
    assert "stopped; the same command goes on from the last checkpoint" in out
    assert code == 130 and "Traceback" not in out
    assert steps_done(tmp_path / "run") >= 1


@pytest.mark.slow
def test_sigterm_saves_the_last_completed_step_and_another_layout_goes_on_from_it(cfg, tmp_path):
    never = ["checkpoint.every=0", "parallel.pp=2"]  # no checkpoint but the one that SIGTERM makes
    _, out = start_and_stop(
        cfg, "preempted", lambda: steps_done(tmp_path / "run") >= 2, signal.SIGTERM, *never, ranks=2
    )
    (saved,) = checkpoint.published(tmp_path / "run")
    step = checkpoint.progress_of(saved).step
    assert step >= 2 and f"stopped by SIGTERM: step {step} is saved; the same command goes on from there" in out
    assert step == steps_done(tmp_path / "run")  # nothing that was done is lost
    out = torchrun(cfg, f"num_steps={step + 1}", "parallel.tp=2", ranks=2)
    assert f"going on from step {step}" in out
    assert [r["step"] for r in rows(tmp_path / "run") if "reward/mean" in r] == list(range(1, step + 2))
    starts = run_folder.read_provenance(tmp_path / "run")
    assert [f"parallel.{axis}=2" in start["command"].split() for start in starts for axis in ("pp", "tp")] == [
        True,
        False,
        False,
        True,
    ]
    assert all(
        start["command"].startswith("torchrun --nproc-per-node 2 launch/train.py ") and "torch" in start["versions"]
        for start in starts
    )


ENDED_CHAT = '{"problem": [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}], "answer": "2"}\n'
BAD_INPUT = {
    "an unknown key": (["rollout.group_sise=4"], "did you mean rollout.group_size"),
    "a wrong type": (["num_steps=many"], "must be of type int"),
    "a tp that does not divide the ranks": (["parallel.tp=3"], "must divide the number of ranks"),
    "a missing model": (["model=nowhere/model"], "neither a folder nor a hub name"),
    "a missing data file": (["data.train=nowhere.jsonl"], "there is no such file"),
    "a missing data file, before the warm start": (
        ["data.train=nowhere.jsonl", "model=not_made_yet", "warm_start.task=two_digit_sums"],
        "there is no such file",
    ),
    "answers that none can give, before the warm start": (
        ["data.train=solutions.jsonl", "model=not_made_yet", "warm_start.task=two_digit_sums"],
        "1 of 1 answers can never be right",
    ),
    "a model that another warm start made": (["warm_start.task=two_digit_sums"], "was not made by this warm_start"),
    "a row without an answer": (["data.train=rows.jsonl"], "line 2"),
    "a source that lacks a column": (
        ["data.train=[{path: solutions.jsonl, answer_from: hash}, {path: rows.jsonl, limit: 1, problem_key: q}]"],
        "rows.jsonl, line 1 = {'problem': '1+1', 'answer': '2'}: has no column 'q'. Remedy: set data.train[1].",
    ),
    "a chat that ends with the assistant": (
        ["data.train=chats.jsonl", "data.chat_template=true"],
        "its 'problem' ends with a message of the assistant",
    ),
    "sequences longer than the model's": (
        ["rollout.max_response_tokens=600", "batch.max_tokens_per_microbatch=2048"],
        "the model was made for",
    ),
    "a run_dir that cannot be made": (["run_dir=cfg.yaml/run"], "cannot be written"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_with_a_remedy(untaught, case):
    (untaught.parent / "rows.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n{"problem": "1+2"}\n')
    (untaught.parent / "solutions.jsonl").write_text('{"problem": "1+1", "answer": "#### 2"}\n')
    (untaught.parent / "chats.jsonl").write_text(ENDED_CHAT)
    overrides, words = BAD_INPUT[case]
    out = train(untaught, *overrides, code=2, timeout_s=60)
    lines = [line for line in out.splitlines() if "arn" not in line]
    assert words in out and "Remedy:" in out and "Traceback" not in out
    assert sum(line.startswith("error:") for line in lines) == 1


@pytest.mark.slow
def test_bad_input_under_torchrun_is_said_by_the_driver(untaught):
    out = torchrun(untaught, "parallel.tp=2", "model=nowhere/model", ranks=2, code=1)
    assert out.count("error: model = 'nowhere/model'") == 1
    out = torchrun(untaught, "parallel.tp=4", ranks=4, code=1)
    assert out.count("error: parallel.tp = 4: must divide the model's 2 key-value heads") == 1


def test_dry_run_prints_derived_sizes_with_units_and_starts_nothing(untaught, tmp_path):
    out = train(untaught, "--dry-run", timeout_s=60)
    for words in (
        "16 responses (4 prompts x 4)",
        "8 responses (over all ranks)",
        "2 optimizer steps",
        "tp 1 x cp 1 x pp 1 x dp 1 = 1 ranks",
    ):
        assert words in out
    assert not (tmp_path / "run").exists()
