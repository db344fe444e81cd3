"""Runs a function on k gloo ranks, or a program: each a process of its own, a deadline, and what it returned or said.

Importing torch, Megatron and transformers takes a process longer than most tests: they are forked from one that has
imported them, as clean as it was then. What must be seen from the start of Python is started by the tests themselves.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock

ROOT = Path(__file__).parent.parent
OF_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Set in the process that starts a Ray; in a child whose modules have been imported without them, Ray believes both.
OF_RAY = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.preload"])


def environment(**extra: str) -> dict[str, str]:
    """Of a child process: one thread that does not spin, none of an outer torchrun's variables or of a Ray's here."""
    kept = {k: v for k, v in os.environ.items() if k not in OF_TORCHRUN + OF_RAY}
    # torchrun's 30 s between SIGTERM and SIGKILL are too few on a busy machine.
    kept["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "120"
    return {**kept, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT), **extra}


@contextlib.contextmanager
def cores() -> Iterator[None]:
    """For what keeps all cores busy: tests that run beside each other (pytest -n) take turns with it."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    with filelock.FileLock(f"{tempfile.gettempdir()}/{run}.lock") if run else contextlib.nullcontext():
        yield


def spawn(function: Callable, ranks: int, *args, timeout_s: float = 240) -> list:
    """function(*args) on each rank; results in rank order. A rank that fails or is late fails the test with its
    output."""
    with tempfile.TemporaryDirectory() as scratch:
        codes, outs = _run(_rank, (function, args), ranks, scratch, timeout_s, {})
        failed = [
            f"rank {r} {'did not end' if code is None else f'ended with {code}'}"
            f"{'' if code or out.exists() else ', without a result'}:\n{_log(out)[-3000:]}"
            for r, (code, out) in enumerate(zip(codes, outs, strict=True))
            if code != 0 or not out.exists()
        ]
        assert not failed, f"within {timeout_s:.0f} s, or 10 s after the first failure:\n" + "\n".join(failed)
        return [pickle.loads(out.read_bytes()) for out in outs]


def program(
    path: str, *args, cwd: Path = ROOT, ranks: int = 0, timeout_s: float = 240, **env: str
) -> subprocess.CompletedProcess:
    """A program of the repository as `python path args` would run it, or torchrun on `ranks`; stdout has stderr as
    well, rank after rank."""
    argv = [str(ROOT / path), *map(str, args)]
    with tempfile.TemporaryDirectory() as scratch:
        codes, outs = _run(_program, (argv, str(cwd)), ranks, scratch, timeout_s, env)
        said, code = "".join(map(_log, outs)), next((c for c in codes if c != 0), 0)
        if code is None:
            raise subprocess.TimeoutExpired(argv, timeout_s, said)
        return subprocess.CompletedProcess(argv, code, said)


def _run(
    target: Callable, args: tuple, ranks: int, scratch: str, timeout_s: float, env: dict[str, str]
) -> tuple[list[int | None], list[Path]]:
    """Exit codes, and the files for results, of target(*args, environment, file) on each rank; 0: of one without."""
    from grpo_mcore.refit.weight_transfer import free_port

    outs = [Path(scratch) / str(rank) for rank in range(ranks or 1)]
    if ranks:
        env |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port("127.0.0.1"))}
    of_rank = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks else {} for rank in range(ranks or 1)]
    processes = [
        _context.Process(target=target, args=(*args, environment(**env, **extra), str(out)))
        for extra, out in zip(of_rank, outs, strict=True)
    ]
    with cores() if ranks > 1 else contextlib.nullcontext():
        return _wait(processes, timeout_s), outs


def _log(out: Path) -> str:
    log = out.with_suffix(".log")
    return log.read_text(errors="replace") if log.exists() else ""


def _wait(processes: list, timeout_s: float) -> list[int | None]:
    """Exit codes, None of those that had to be ended: at the deadline, or 10 s after one that failed. What they have
    started ends with them."""
    for p in processes:
        p.start()
    end = time.monotonic() + timeout_s
    try:
        while None in (codes := [p.exitcode for p in processes]) and time.monotonic() < end:
            if any(codes):
                end = min(end, time.monotonic() + 10)
            time.sleep(0.02)
        return codes
    finally:
        for p in processes:
            p.kill()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(p.pid, signal.SIGKILL)
            p.join()


def _begin(env: dict[str, str], out: str) -> None:
    os.environ.clear()
    os.environ.update(env)
    log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.setsid()
    faulthandler.enable()
    warnings.filterwarnings("ignore")


def _rank(function: Callable, args: tuple, env: dict[str, str], out: str) -> None:
    _begin(env, out)
    Path(out).write_bytes(pickle.dumps(function(*args)))


def _program(argv: list[str], cwd: str, env: dict[str, str], out: str) -> None:
    _begin(env, out)
    os.chdir(cwd)
    sys.argv = argv
    sys.path.insert(0, str(Path(argv[0]).parent))
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None
