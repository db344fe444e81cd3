r"""A process that compares answers and can be killed, from both sides: `python -m grpo_mcore.reward.grading_process`.

Comparing two formulas can take for ever or crash, whatever time-out the comparing library promises. Each question has
its own budget of processor time, which is what a busy machine does not falsify, a wider one of clock time, and its
process a limit of memory.

The processes are fresh interpreters rather than forks: their parent has threads, process groups and a __main__ that
must not be imported again. They get the boxed answer and the gold answer, never a response's text.
"""

import contextlib
import json
import logging
import os
import resource
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from grpo_mcore.reward.verifiers import VERIFIERS

START_UP_S = 120.0
"""Clock seconds for a process to be ready: it imports sympy, perhaps beside many others on a busy file system."""
_EXIT_S = 10.0  # clock seconds for a killed process to be gone
_ORPHAN_S = 2.0  # how often an idle process looks whether its parent is still there


class Question(NamedTuple):
    verifier: str  # a key of VERIFIERS
    answer: str
    gold: str


class Reply(NamedTuple):
    equal: bool | None  # None: stopped, or crashed
    rule: str  # that decided, or the limit that it ran into


class GradingProcess:
    """One comparing process, seen from its parent: it starts, is idle or asked, and has ended.

    Protocol: lines of JSON. It says "ready"; then for each question [verifier, answer, gold] the reply [equal, rule].
    """

    def __init__(self, cpu_s: float, memory_bytes: int):
        self._cpu_s, self._memory_bytes = cpu_s, memory_bytes
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "grpo_mcore.reward.grading_process", repr(cpu_s), str(memory_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).resolve().parents[2],
        )
        assert self._popen.stdin is not None and self._popen.stdout is not None
        self._questions, self._replies = self._popen.stdin, self._popen.stdout
        os.set_blocking(self.fileno(), False)
        self._received = b""
        self._is_ready = self._has_answered = self.has_ended = False
        self.question: Question | None = None
        self._set_deadline(START_UP_S, "start-up")

    @property
    def is_idle(self) -> bool:
        return self._is_ready and self.question is None and not self.has_ended

    def fileno(self) -> int:
        return self._replies.fileno()

    def ask(self, question: Question, wall_s: float) -> bool:
        """Sends a question. False, and the process is ended, if it had died while it was idle."""
        try:
            self._questions.write(json.dumps(question).encode() + b"\n")
            self._questions.flush()
        except BrokenPipeError:
            cause = self._cause_of_end()
            if not self._has_answered:  # replacing such processes might never end
                raise RuntimeError(f"a grading process died before its first question: {cause}") from None
            return False
        self.question = question
        self._set_deadline(wall_s, "wall_s")
        return True

    def read_reply(self) -> Reply | None:
        """Takes what has arrived, or the passed deadline. None after a start-up or half a line."""
        chunk = self._replies.read()  # None: nothing yet; b"": the other end is closed
        self._received += chunk or b""
        if self._received.endswith(b"\n"):
            line, self._received = self._received, b""
            return self._take(line)
        if chunk == b"":
            cause = self._cause_of_end()
        elif time.monotonic() >= self.deadline:
            self.end()
            cause = f"killed after {self._limit}"
        else:
            return None
        if not self._is_ready:
            raise RuntimeError(
                f"a grading process did not start: {cause}; what it printed is on stderr. Remedy: install "
                f"math-verify, or raise memory_bytes = {self._memory_bytes}, or relieve the machine"
            )
        return Reply(None, cause)

    def _take(self, line: bytes) -> Reply | None:
        if not self._is_ready:
            self._is_ready = True
            return None
        self.question, self._has_answered = None, True
        return Reply(*json.loads(line))

    def _set_deadline(self, seconds: float, name: str) -> None:
        self.deadline = time.monotonic() + seconds
        self._limit = f"{name} = {seconds:g} s of clock time"

    def end(self) -> int:
        """Kills and reaps it; the exit status is that of its own end if it came first."""
        self.has_ended = True
        self._popen.kill()
        status = self._popen.wait(timeout=_EXIT_S)
        self._replies.close()
        with contextlib.suppress(BrokenPipeError):
            self._questions.close()
        return status

    def _cause_of_end(self) -> str:
        status = self.end()
        if status == -signal.SIGPROF:
            return f"killed after cpu_s = {self._cpu_s:g} s of processor time"
        return f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"


def _serve(cpu_s: float, memory_bytes: int) -> None:
    """The comparing process, until its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # the default action ends the process, also inside C code
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # both survive an exec
    parent = os.getppid()
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = memory_bytes if most == resource.RLIM_INFINITY else min(memory_bytes, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time-outs are off
    for verifier in VERIFIERS.values():
        verifier.compare("x+1", "1+x")  # the imports and the parser's tables belong to the start-up
    replies = os.dup(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)  # what a parser prints must neither enter the protocol
    os.dup2(null, 2)  # nor the log, a line for each malformed answer
    os.write(replies, b'"ready"\n')
    while True:
        # The end of stdin says that the parent is gone, unless a fork of the parent holds the other end.
        if not select.select([0], [], [], _ORPHAN_S)[0]:
            if os.getppid() != parent:
                return
            continue
        line = sys.stdin.buffer.readline()
        if not line:
            return
        verifier, answer, gold = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        reply = VERIFIERS[verifier].compare(answer, gold)
        signal.setitimer(signal.ITIMER_PROF, 0)
        os.write(replies, json.dumps(reply).encode() + b"\n")


if __name__ == "__main__":
    _serve(cpu_s=float(sys.argv[1]), memory_bytes=int(sys.argv[2]))
