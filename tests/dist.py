"""Runs a function on k gloo ranks: one process each, a deadline, and every rank's return value."""

import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent


def environment(**extra: str) -> dict[str, str]:
    """Of a child process: one thread that does not spin, and none of an outer torchrun's variables."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    }
    return {**kept, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT), **extra}


def spawn(function: Callable, ranks: int, *args, timeout_s: float = 240) -> list:
    """function(*args) on each rank; results in rank order. A rank that fails or is late fails the test with its
    output."""
    from grpo_mcore.refit.weight_transfer import free_port

    port = str(free_port("127.0.0.1"))
    with tempfile.TemporaryDirectory() as scratch:
        call = Path(scratch) / "call"
        call.write_bytes(pickle.dumps((function.__module__, function.__qualname__, args)))
        logs = [Path(scratch) / f"log{rank}" for rank in range(ranks)]
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.dist", str(call), f"{scratch}/result{rank}"],
                cwd=ROOT,
                stdout=log.open("w"),
                stderr=subprocess.STDOUT,
                env=environment(
                    RANK=str(rank),
                    WORLD_SIZE=str(ranks),
                    LOCAL_RANK=str(rank),
                    MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=port,
                ),
            )
            for rank, log in enumerate(logs)
        ]
        end = time.monotonic() + timeout_s
        try:
            while None in (codes := [p.poll() for p in processes]) and time.monotonic() < end:
                if any(codes):  # those left wait for the one that failed
                    end = min(end, time.monotonic() + 10)
                time.sleep(0.02)
        finally:
            for p in processes:
                p.kill()
                p.wait()
        if any(codes):
            raise AssertionError(
                "\n".join(
                    f"rank {r} ended with {c}:\n{log.read_text()[-3000:]}"
                    for r, (c, log) in enumerate(zip(codes, logs, strict=True))
                    if c != 0
                )
            )
        return [pickle.loads(Path(f"{scratch}/result{rank}").read_bytes()) for rank in range(ranks)]


if __name__ == "__main__":
    import importlib
    import warnings

    warnings.filterwarnings("ignore")
    module, name, args = pickle.loads(Path(sys.argv[1]).read_bytes())
    result = getattr(importlib.import_module(module), name)(*args)
    Path(sys.argv[2]).write_bytes(pickle.dumps(result))
