"""Runs a program of benchmarks/ and reads its result."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from benchmarks import results
from tests.dist import ROOT, environment


def report_of(
    program: str, *arguments: object, out: Path, timeout_s: float, launcher: tuple[str, ...] = (), **variables: str
) -> dict:
    """The result, whose head says what it depends on, and whose headline figures RESULTS.md could show.

    Whatever the program has started ends with it."""
    command = [sys.executable, *launcher, f"benchmarks/{program}.py", "--out", str(out), *map(str, arguments)]
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])  # what is found here is found there: TRL
    log = out.with_suffix(".log")
    with log.open("w") as said:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(PYTHONPATH=path, **variables),
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout_s)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)  # first, so that it ends what has a session of its own
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert code == 0, log.read_text()[-3000:]
    report = json.loads(out.read_text())
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", report["git_commit"])
    assert f"benchmarks/{program}.py --out {out}" in report["command"]
    assert report["hardware"]["cores"] >= 1 and report["hardware"]["memory_gib"] > 0 and report["versions"]["torch"]
    assert results.section(out.name, report).startswith(f"## {out.name}")
    return report
