r"""Responses -> rewards: 1 if the last box holds the gold answer, else 0, by math_answer.py.

Comparing two formulas can take for ever or crash, whatever time-out the comparing library promises, so what needs algebra
runs in processes that the clock can kill (`python -m grpo_mcore.reward`, started when first needed and then kept). Each
question has its own budget of processor time, which is what a busy machine does not falsify, a wider one of clock time,
and its process a limit of memory. What runs out of any of them is a wrong answer with a status of its own, because the
number of those is a metric: a grader that is too tight makes wrong zeros.

The processes are fresh interpreters rather than forks: their parent has threads, process groups and a __main__ that must
not be imported again. They get the boxed answer and the gold answer, never a response's text.
"""
import contextlib
import enum
import json
import logging
import math
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from grpo_mcore.math_answer import MAX_BOX_CHARS, extract_boxed, is_equal, is_equal_as_text

START_UP_S = 120.0
"""Clock seconds for a process to be ready: it imports sympy, perhaps beside many others on a busy file system."""
MAX_GOLD_CHARS = 4096
"""So that a question always fits into an empty pipe (64 KiB, at most 12 bytes a character): writing one never waits."""
_EXIT_S = 10.0   # clock seconds for a killed process to be gone
_ORPHAN_S = 2.0  # how often an idle process looks whether its parent is still there


class Status(enum.StrEnum):
    """Why a response got its reward: 1 for CORRECT, 0 for the others."""
    CORRECT = "correct"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"    # no balanced, non-blank box of at most MAX_BOX_CHARS characters
    TRUNCATED = "truncated"    # the same, of a response that hit its length limit
    TIMED_OUT = "timed_out"    # the comparison was stopped or crashed; the verdict's detail names the limit


@dataclass(frozen=True)
class Verdict:
    r"""The grade of one response.

    >>> Verdict(1.0, Status.CORRECT, r"\frac{3}{4}", "equal by math-verify")               # gold 0.75
    >>> Verdict(0.0, Status.WRONG, "12", "not equal by text")                              # gold 13
    >>> Verdict(0.0, Status.TRUNCATED, None, r"no \boxed{} of 1 to 512 characters after the first </think>")
    >>> Verdict(0.0, Status.TIMED_OUT, "9^{9^{9^9}}", "killed after cpu_s = 2 s of processor time")
    """
    reward: float
    status: Status
    answer: str | None  # what the box holds, as written
    detail: str


class Grader:
    """Grades responses; a context manager, for use from one thread at a time.

    num_processes: processes that compare, started as far as there are questions for them.
    cpu_s, wall_s: processor and clock seconds for one comparison; start-up does not count. wall_s >= cpu_s.
    memory_bytes: address space of each process. Importing sympy takes about 64 MiB of it.
    """

    def __init__(self, num_processes: int, cpu_s: float, wall_s: float, memory_bytes: int):
        if num_processes < 1:
            raise ValueError(f"num_processes = {num_processes}: must be at least 1")
        if not 0 < cpu_s <= wall_s < math.inf:
            raise ValueError(f"cpu_s = {cpu_s}, wall_s = {wall_s}: must be positive, finite, and cpu_s <= wall_s, since a "
                             "process never has more processor time than clock time. Remedy: raise wall_s")
        if memory_bytes < 1:
            raise ValueError(f"memory_bytes = {memory_bytes}: must be positive")
        self._num_processes, self._cpu_s, self._wall_s, self._memory_bytes = num_processes, cpu_s, wall_s, memory_bytes
        self._processes: list[_Process] = []
        self._is_closed = False

    def grade(self, items: Sequence[tuple[str, str, bool]]) -> list[Verdict]:
        """One verdict for each (response text, gold answer, truncated), in order.

        A truncated response is graded like any other: it may hold its box already. Equal questions are asked once.
        ValueError if a gold answer is not a string of 1 to MAX_GOLD_CHARS characters, or the grader is closed.
        RuntimeError if a process cannot start.
        """
        if self._is_closed:
            raise ValueError("this Grader is closed")
        for index, (_, gold, _) in enumerate(items):
            if not isinstance(gold, str) or not gold.strip() or len(gold) > MAX_GOLD_CHARS:
                raise ValueError(f"items[{index}]: the gold answer is {str(gold)[:80]!r} ({type(gold).__name__}): must be a "
                                 f"non-blank string of at most {MAX_GOLD_CHARS} characters")
        graded = [_grade_text(text, gold, truncated) for text, gold, truncated in items]
        questions = dict.fromkeys(entry for entry in graded if isinstance(entry, tuple))
        verdict_of = self._ask_all(list(questions))
        return [entry if isinstance(entry, Verdict) else verdict_of[entry] for entry in graded]

    def close(self) -> None:
        """Ends the processes; a second call does nothing."""
        self._is_closed = True
        self._end_all()

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *_exception) -> None:
        self.close()

    def _ask_all(self, questions: list[tuple[str, str]]) -> dict[tuple[str, str], Verdict]:
        waiting, verdict_of = deque(questions), {}
        try:
            while len(verdict_of) < len(questions):
                unanswered = len(questions) - len(verdict_of)
                while len(self._processes) < min(self._num_processes, unanswered):
                    self._processes.append(_Process(self._cpu_s, self._memory_bytes))
                for process in self._processes:
                    if process.is_idle and waiting and process.ask(waiting[0], self._wall_s):
                        waiting.popleft()
                for process in self._next_events():
                    question, verdict = process.question, process.read_verdict()
                    if verdict is not None:
                        verdict_of[question] = verdict
                self._processes = [process for process in self._processes if not process.has_ended]
        except BaseException:  # Ctrl-C among them: a reply that is still to come must not meet the next call's question
            self._end_all()
            raise
        return verdict_of

    def _next_events(self) -> list["_Process"]:
        """Waits for a process that has something to read or is past its deadline."""
        poll, by_fd = select.poll(), {}
        for process in self._processes:
            if not process.is_idle and not process.has_ended:
                by_fd[process.fileno()] = process
                poll.register(process.fileno(), select.POLLIN)
        if not by_fd:
            return []
        seconds = min(process.deadline for process in by_fd.values()) - time.monotonic()
        readable = {fd for fd, _ in poll.poll(max(0, math.ceil(seconds * 1000)))}
        now = time.monotonic()
        return [process for fd, process in by_fd.items() if fd in readable or now >= process.deadline]

    def _end_all(self) -> None:
        while self._processes:
            self._processes.pop().end()


def counts(verdicts: Sequence[Verdict]) -> dict[str, int]:
    """How many verdicts have each status; every status is a key: {"correct": 3, "wrong": 1, "no_answer": 0, ...}."""
    number = {status.value: 0 for status in Status}
    for verdict in verdicts:
        number[verdict.status.value] += 1
    return number


def _grade_text(text: str, gold: str, truncated: bool) -> Verdict | tuple[str, str]:
    """The verdict or, if it takes algebra, the question (answer, gold)."""
    answer = extract_boxed(text)
    if answer is None:
        status = Status.TRUNCATED if truncated else Status.NO_ANSWER
        return Verdict(0.0, status, None, rf"no \boxed{{}} of 1 to {MAX_BOX_CHARS} characters after the first </think>")
    equal = is_equal_as_text(answer, gold)
    return (answer, gold) if equal is None else _verdict(answer, equal, "text")


def _verdict(answer: str, equal: bool, judge: str) -> Verdict:
    if equal:
        return Verdict(1.0, Status.CORRECT, answer, f"equal by {judge}")
    return Verdict(0.0, Status.WRONG, answer, f"not equal by {judge}")


class _Process:
    """One comparing process, seen from its parent: it starts, is idle or asked, and has ended.

    Protocol: lines of JSON. It says "ready"; then for each [answer, gold] true or false.
    """

    def __init__(self, cpu_s: float, memory_bytes: int):
        self._cpu_s, self._memory_bytes = cpu_s, memory_bytes
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "grpo_mcore.reward", repr(cpu_s), str(memory_bytes)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).resolve().parents[1])
        os.set_blocking(self.fileno(), False)
        self._received = b""
        self._is_ready = self._has_answered = self.has_ended = False
        self.question: tuple[str, str] | None = None
        self._set_deadline(START_UP_S, "start-up")

    @property
    def is_idle(self) -> bool:
        return self._is_ready and self.question is None and not self.has_ended

    def fileno(self) -> int:
        return self._popen.stdout.fileno()

    def ask(self, question: tuple[str, str], wall_s: float) -> bool:
        """Sends a question. False, and the process is ended, if it had died while it was idle."""
        try:
            self._popen.stdin.write(json.dumps(question).encode() + b"\n")
            self._popen.stdin.flush()
        except BrokenPipeError:
            cause = self._cause_of_end()
            if not self._has_answered:  # replacing such processes might never end
                raise RuntimeError(f"a grading process died before its first question: {cause}") from None
            return False
        self.question = question
        self._set_deadline(wall_s, "wall_s")
        return True

    def read_verdict(self) -> Verdict | None:
        """Takes what has arrived, or the passed deadline. None after a start-up or half a line."""
        chunk = self._popen.stdout.read()  # None: nothing yet; b"": the other end is closed
        self._received += chunk or b""
        if self._received.endswith(b"\n"):
            reply, self._received = json.loads(self._received), b""
            return self._take(reply)
        if chunk == b"":
            cause = self._cause_of_end()
        elif time.monotonic() >= self.deadline:
            self.end()
            cause = f"killed after {self._limit}"
        else:
            return None
        if not self._is_ready:
            raise RuntimeError(f"a grading process did not start: {cause}; what it printed is on stderr. Remedy: install "
                               f"math-verify, or raise memory_bytes = {self._memory_bytes}, or relieve the machine")
        return Verdict(0.0, Status.TIMED_OUT, self.question[0], cause)

    def _take(self, reply: str | bool) -> Verdict | None:
        if not self._is_ready:
            self._is_ready = True
            return None
        (answer, _), self.question, self._has_answered = self.question, None, True
        return _verdict(answer, reply, "math-verify")

    def _set_deadline(self, seconds: float, name: str) -> None:
        self.deadline = time.monotonic() + seconds
        self._limit = f"{name} = {seconds:g} s of clock time"

    def end(self) -> int:
        """Kills and reaps it; the exit status is that of its own end if it came first."""
        self.has_ended = True
        self._popen.kill()
        status = self._popen.wait(timeout=_EXIT_S)
        self._popen.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            self._popen.stdin.close()
        return status

    def _cause_of_end(self) -> str:
        status = self.end()
        if status == -signal.SIGPROF:
            return f"killed after cpu_s = {self._cpu_s:g} s of processor time"
        return f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"


def _serve(cpu_s: float, memory_bytes: int) -> None:
    """The comparing process, until its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)    # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGPROF, signal.SIG_DFL)   # the default action ends the process, also inside C code
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # both survive an exec
    parent = os.getppid()
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = memory_bytes if most == resource.RLIM_INFINITY else min(memory_bytes, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time-outs are off
    is_equal("x+1", "1+x")  # the imports and the parser's tables belong to the start-up
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
        answer, gold = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        equal = is_equal(answer, gold)
        signal.setitimer(signal.ITIMER_PROF, 0)
        os.write(replies, json.dumps(equal).encode() + b"\n")


if __name__ == "__main__":
    _serve(cpu_s=float(sys.argv[1]), memory_bytes=int(sys.argv[2]))
