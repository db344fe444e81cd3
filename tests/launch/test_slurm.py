"""launch/slurm: the real scripts with the real training program, on a cluster of loopback addresses (fake_slurm.py).

Not covered here: a real SLURM, whose cgroups, limits and accounting are its own; GPUs; a network between nodes.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from grpo_mcore.checkpoint import checkpoint
from grpo_mcore.report import run_folder
from tests.conftest import CONFIG
from tests.dist import ROOT, environment
from tests.test_trainer import processes_with, steps_done, wait_until

SCRIPTS = sorted((ROOT / "launch/slurm").iterdir())
NUM_STEPS = 8


class Job:
    """A job that sbatch has started."""

    def __init__(self, folder: Path, cfg: Path, script: str, *args: str, nodes: int = 0, **variables: str):
        self.folder, self.log, self.id = folder, folder / "job.log", str(os.getpid() * 1000 + int(time.time()) % 1000)
        programs = folder / "programs"
        programs.mkdir()
        for name in ("sbatch", "srun", "scancel", "scontrol", "hostname"):
            (programs / name).write_text(
                f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/launch/fake_slurm.py {name} "$@"\n'
            )
            (programs / name).chmod(0o755)
        self.marker = f"TEST_MARKER=job_{self.id}"
        nowhere = folder / "no_venv"  # the one that runs this test is first on PATH
        env = environment(
            TEST_MARKER=f"job_{self.id}",
            FAKE_SLURM=str(folder),
            SLURM_JOB_ID=self.id,
            GPUS_PER_NODE="1",
            VENV=str(nowhere),
            PATH=f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            **variables,
        )
        del env["CUDA_VISIBLE_DEVICES"]  # the tests' own, which hides all: each node's Ray is told that it has a GPU
        self.process = subprocess.Popen(
            ["sbatch", *(["--nodes", str(nodes)] if nodes else []), f"launch/slurm/{script}", str(cfg), *args],
            cwd=ROOT,
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            env=env,
        )

    def signal_batch_script(self, how: signal.Signals) -> None:
        os.kill(int((self.folder / "batch.pid").read_text()), how)

    def wait_for_step(self, run_dir: Path, step: int) -> None:
        wait_until(lambda: steps_done(run_dir) >= step or self.process.poll() is not None, 400, self.text)
        assert self.process.poll() is None, self.text()

    def text(self) -> str:
        return self.log.read_text()[-6000:]

    def end(self) -> int:
        """Its exit status, when no process of it is left."""
        try:
            code = self.process.wait(500)
            wait_until(
                lambda: not processes_with(self.marker),
                60,
                lambda: f"all processes to end; there remain {processes_with(self.marker)}",
            )
            assert not list(Path("/tmp").glob(f"ray_{self.id}*"))
            return code
        finally:
            for line in processes_with(self.marker):  # of a test that failed
                os.kill(int(line.split()[0]), signal.SIGKILL)


@pytest.fixture
def cfg(tmp_path, taught) -> Path:
    path = tmp_path / "cfg.yaml"
    text = CONFIG.format(model=taught, run_dir=tmp_path / "run")
    path.write_text(
        text.replace("num_steps: 4", f"num_steps: {NUM_STEPS}").replace(
            "checkpoint: {every: 1}", "checkpoint: {every: 0}"
        )
    )
    return path


def check_that_no_step_is_missing(run_dir: Path) -> None:
    assert [row["step"] for row in run_folder.read_metrics(run_dir) if "reward/mean" in row] == list(
        range(1, NUM_STEPS + 1)
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_one_that_bash_reads(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0


@pytest.mark.slow
def test_two_nodes_train_with_engines_on_both_and_go_on_where_the_time_limit_stopped_them(cfg, tmp_path):
    # Engines of one core each: Ray has to place them on both nodes. Other nodes' memory cannot be shared: it is
    # broadcast.
    job = Job(tmp_path, cfg, "multi_node.sbatch", "engine.num_engines=2", "refit.transport=broadcast", nodes=2)
    try:
        job.wait_for_step(tmp_path / "run", 2)
        job.signal_batch_script(signal.SIGUSR1)
        wait_until(lambda: "requeueing" in job.log.read_text() or job.process.poll() is not None, 300, job.text)
    finally:
        code = job.end()
    out = job.log.read_text()
    assert code == 0, job.text()
    (saved,) = [line for line in out.splitlines() if "stopped by SIGTERM: step" in line]
    step = int(saved.split(": step ")[1].split()[0])
    assert step >= 2 and f"going on from step {step}" in out
    assert "tasks ended with [0, 0]" in out and out.count("batch script ended with") == 2
    check_that_no_step_is_missing(tmp_path / "run")


@pytest.mark.slow
def test_scancel_saves_and_does_not_requeue_and_the_same_command_goes_on_with_an_engine_node(cfg, tmp_path):
    job = Job(tmp_path, cfg, "multi_node.sbatch", "engine.placement=auto", nodes=2, ENGINE_NODES="1")
    try:
        job.wait_for_step(tmp_path / "run", 1)
        job.signal_batch_script(signal.SIGTERM)  # scancel JOB: the batch script and every task
        for task in (tmp_path / "tasks").iterdir():
            os.killpg(int(task.name), signal.SIGTERM)
    finally:
        code = job.end()
    assert (
        code != 0 and "requeueing" not in job.log.read_text() and job.log.read_text().count("batch script ended") == 1
    ), job.text()
    (saved,) = checkpoint.published(tmp_path / "run")
    assert checkpoint.progress_of(saved).step == steps_done(tmp_path / "run") >= 1


@pytest.mark.slow
def test_one_node_goes_on_where_the_time_limit_stopped_it(cfg, tmp_path):
    # What `ray start` leaves on a node: the address of a cluster, which is another's or gone. The run makes its own.
    ray_folder = Path(tempfile.mkdtemp(dir="/tmp"))  # short: sockets are in it
    (ray_folder / "ray").mkdir()
    (ray_folder / "ray/ray_current_cluster").write_text("127.0.0.1:1")
    job = Job(tmp_path, cfg, "one_node.sbatch", RAY_TMPDIR=str(ray_folder))
    try:
        job.wait_for_step(tmp_path / "run", 1)
        job.signal_batch_script(signal.SIGUSR1)
    finally:
        code = job.end()
        shutil.rmtree(ray_folder)
    out = job.log.read_text()
    assert code == 0 and "requeueing" in out and "going on from step" in out, job.text()
    check_that_no_step_is_missing(tmp_path / "run")


@pytest.mark.slow
def test_bad_input_ends_the_whole_job_and_says_why(cfg, tmp_path):
    job = Job(tmp_path, cfg, "multi_node.sbatch", "data.train=nowhere.jsonl", nodes=2)
    assert job.end() != 0
    assert "error: data.train = 'nowhere.jsonl'" in job.log.read_text() and "requeueing" not in job.log.read_text()
