"""sbatch, srun, scancel, scontrol and hostname of a cluster that is this machine: fake_slurm.py PROGRAM [arguments].

A node is a session of processes with a loopback address of its own. What SLURM does that scripts stumble over, this
does too: a batch script runs from a copy elsewhere, srun that is told TERM kills its tasks, scancel's TERM reaches a
task's whole process group, and no batch script. FAKE_SLURM is a folder: batch.pid, the ids of running tasks in tasks/,
and `requeue` once scontrol was asked to. sbatch stays until the job ends.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(os.environ["FAKE_SLURM"])


def sbatch(*args: str) -> int:
    options = [args.index(a) for a in args if a.startswith("--nodes")]
    script = args[2 if options else 0]
    directives = [line.split()[1] for line in Path(script).read_text().splitlines() if line.startswith("#SBATCH")]
    assert "--requeue" in directives and any(d.startswith("--signal=B:USR1@") for d in directives)
    nodes = args[1] if options else next(d.split("=")[1] for d in directives if d.startswith("--nodes"))
    copy = FOLDER / "spool" / "slurm_script"
    copy.parent.mkdir(exist_ok=True)
    for restarts in range(5):
        shutil.copy(script, copy)
        environment = {
            **os.environ,
            "SLURM_NNODES": nodes,
            "SLURM_RESTART_COUNT": str(restarts),
            "SLURM_CPUS_ON_NODE": "1",
            "SLURM_NODEID": "0",
        }
        batch = subprocess.Popen(
            ["bash", copy, *args[args.index(script) + 1 :]], env=environment, start_new_session=True
        )
        (FOLDER / "batch.pid").write_text(str(batch.pid))
        code = batch.wait()
        print(f"batch script ended with {code}", flush=True)
        if not (FOLDER / "requeue").exists():
            return code
        (FOLDER / "requeue").unlink()
    return 1


def srun(*args: str) -> int:
    options = dict(a.removeprefix("--").split("=") for a in args if a.startswith("--") and "=" in a)
    program = list(args[next(i for i, a in enumerate(args) if not a.startswith("--")) :])
    tasks = [
        subprocess.Popen(
            program, start_new_session=True, env={**os.environ, "SLURM_NODEID": str(i), "SLURM_PROCID": str(i)}
        )
        for i in range(int(options["ntasks"]))
    ]
    (FOLDER / "tasks").mkdir(exist_ok=True)
    for task in tasks:
        (FOLDER / "tasks" / str(task.pid)).touch()

    def kill(*_):
        for task in tasks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(task.pid, signal.SIGKILL)

    signal.signal(signal.SIGTERM, kill)
    end = None
    while None in (codes := [task.poll() for task in tasks]):
        if end is None and any(code is not None for code in codes):
            end = time.monotonic() + int(options["wait"])
        if end is not None and time.monotonic() > end:
            print("srun: the first task ended, and the others are killed", flush=True)
            kill()
        time.sleep(0.2)
    for task in tasks:
        (FOLDER / "tasks" / str(task.pid)).unlink()
    print(f"tasks ended with {codes}", flush=True)
    return max(code if code >= 0 else 128 - code for code in codes)


def scancel(how: str, job: str) -> int:
    assert job == os.environ["SLURM_JOB_ID"]
    for task in (FOLDER / "tasks").iterdir():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(task.name), getattr(signal, "SIG" + how.removeprefix("--signal=")))
    return 0


def scontrol(what: str, job: str) -> int:
    assert (what, job) == ("requeue", os.environ["SLURM_JOB_ID"])
    (FOLDER / "requeue").touch()
    return 0


def hostname(option: str) -> int:
    assert option == "-I"
    print(f"127.0.0.{2 + int(os.environ['SLURM_NODEID'])} 192.0.2.1")
    return 0


if __name__ == "__main__":
    sys.exit(globals()[sys.argv[1]](*sys.argv[2:]))
