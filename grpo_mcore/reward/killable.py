r"""Processes that answer questions and can be killed, and a pool of them.

What is asked may run for ever or crash, whatever its own time-outs promise. Each question has its own budget of
processor time, which is what a busy machine does not falsify, a wider one of clock time, and its process a limit of
memory. The processes are fresh interpreters rather than forks: their parent has threads, process groups and a __main__
that must not be imported again.

The process's own side is channel.py.
"""

import array
import contextlib
import fcntl
import itertools
import json
import math
import os
import pickle
import selectors
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_mcore.reward.channel import AT_ONCE, HEADER

START_UP_S = 120.0
"""Clock seconds for a process to be ready: it imports sympy, or what a user's file imports, perhaps beside many others
on a busy file system."""
_EXIT_S = 10.0  # clock seconds for a killed process to be gone
_AWAIT_S = 5.0  # what an event loop gets beyond wall_s to end a question itself
_PRINTED_BYTES = 4096  # of what a process printed last, kept for the words about its end
_CHUNK_BYTES, _PIPE_BYTES = 1 << 16, 1 << 16


@dataclass(frozen=True)
class Limits:
    cpu_s: float  # processor time of one question
    wall_s: float  # clock time of one question
    memory_bytes: int


@dataclass(frozen=True)
class Stopped:
    """Instead of a reply."""

    cause: str  # the limit that was reached, or how the process ended
    is_limit: bool
    printed: str = ""  # by it, at the end


class StartError(RuntimeError):
    """A process did not get ready."""


class _Process:
    """One process, seen from its parent: it starts, is asked, and has ended."""

    def __init__(self, command: Sequence[str], limits: Limits):
        self._limits = limits
        root = str(Path(__file__).resolve().parents[2])
        paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        self._popen = subprocess.Popen(
            [sys.executable, "-P", "-m", *command],  # -P: what lies in this folder is not to be imported unasked
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": paths},
            start_new_session=True,  # what it starts is ended with it
        )
        assert self._popen.stdin and self._popen.stdout and self._popen.stderr
        self.questions, self.replies, self.prints = self._popen.stdin, self._popen.stdout, self._popen.stderr
        for pipe in (self.questions, self.replies, self.prints):
            os.set_blocking(pipe.fileno(), False)
        self._received, self._to_send = bytearray(), bytearray()
        self._printed, self.has_closed_prints = b"", False
        self.asked: dict[int, float] = {}  # number of a question -> its deadline
        self.says: dict[str, Any] | None = None  # of itself, once it is ready
        self.has_answered = False
        self._sent = 0  # bytes since the last reply
        self._start_by = time.monotonic() + START_UP_S

    @property
    def deadline(self) -> float:
        return self._start_by if self.says is None else min(self.asked.values(), default=math.inf)

    @property
    def limit(self) -> str:
        """That of the deadline, in words."""
        if self.says is None:
            return f"start-up = {START_UP_S:g} s of clock time"
        return f"wall_s = {self._limits.wall_s:g} s of clock time"

    @property
    def room(self) -> int:
        """How many more questions it takes."""
        return 0 if self.says is None else self.says.get(AT_ONCE, 1) - len(self.asked)

    @property
    def is_sending(self) -> bool:
        return bool(self._to_send)

    def ask(self, number: int, question: bytes) -> None:
        assert self.says is not None
        grace = _AWAIT_S if AT_ONCE in self.says else 0.0  # it watches the clock of each itself
        self.asked[number] = time.monotonic() + self._limits.wall_s + grace
        self._to_send += HEADER.pack(number, len(question)) + question

    def send(self) -> None:
        """As much as the pipe takes. That a process is gone is seen by its replies."""
        with contextlib.suppress(BrokenPipeError):
            while self._to_send and (sent := self.questions.write(self._to_send[:_CHUNK_BYTES])):
                del self._to_send[:sent]
                self._sent += sent

    def receive(self) -> list[tuple[int, Any]] | None:
        """(number, what is said) of all that has arrived whole; None if no more will."""
        chunk = self.replies.read(_CHUNK_BYTES)  # None: nothing yet; b"": the other end is closed
        self._received += chunk or b""
        self._sent = 0 if chunk else self._sent
        found = []
        while len(self._received) >= HEADER.size:
            number, size = HEADER.unpack_from(self._received)
            end = HEADER.size + size
            if len(self._received) < end:
                break
            found.append((number, json.loads(self._received[HEADER.size : end])))
            del self._received[:end]
        return None if chunk == b"" else found

    def listen(self) -> bool:
        """Takes what it printed; False if there is nothing."""
        chunk = self.prints.read(_CHUNK_BYTES)
        self.has_closed_prints = chunk == b""
        self._printed = (self._printed + (chunk or b""))[-_PRINTED_BYTES:]
        return bool(chunk)

    def has_read_nothing(self) -> bool:
        """Of what was sent since its last reply: it was gone before."""
        unread = array.array("i", [0])
        fcntl.ioctl(self.questions.fileno(), termios.FIONREAD, unread)
        return unread[0] == self._sent

    def end(self, over: str | None = None) -> Stopped:
        """Kills and reaps it and what it started, since it is `over` a limit, or gone."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        status = self._popen.wait(timeout=_EXIT_S)
        for _ in range(_PIPE_BYTES // _CHUNK_BYTES + 1):
            self.listen()
        for pipe in (self.questions, self.replies, self.prints):
            pipe.close()
        if over is None and status == -signal.SIGPROF:
            over = f"cpu_s = {self._limits.cpu_s:g} s of processor time"
        ended = f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
        cause = f"killed after {over}" if over else ended
        return Stopped(cause, over is not None, self._printed.decode(errors="replace"))

    @property
    def pid(self) -> int:
        return self._popen.pid


@dataclass
class _Asked:
    question: bytes
    answer: "Future[Any]"

    def begin(self) -> bool:
        """False if it was withdrawn."""
        return self.answer.running() or self.answer.set_running_or_notify_cancel()


class Pool:
    """Up to `num_processes` of `python -m` `command`, started when first needed and then kept. A thread speaks with
    them; any thread may ask."""

    def __init__(self, command: Sequence[str], limits: Limits, *, num_processes: int, remedy: str):
        """`remedy`: what else to do about a process that does not start."""
        self._command, self._limits, self._num_processes, self._remedy = command, limits, num_processes, remedy
        self._changed = threading.Lock()  # guards what follows
        self._numbers = itertools.count(1)
        self._waiting: dict[int, _Asked] = {}
        self._starting: list[Future[Any]] = []  # of those who wait for a process, whatever it is asked
        self._is_closed = False
        self._thread: threading.Thread | None = None
        self._wake_in, self._wake_out = os.pipe()
        for fd in (self._wake_in, self._wake_out):
            os.set_blocking(fd, False)
        # Of the thread alone:
        self._processes: list[_Process] = []
        self._asked: dict[int, _Asked] = {}  # what processes are at

    def says(self) -> dict[str, Any]:
        """What a process says of itself when it is ready. Raises StartError."""
        says: dict[str, Any] = self._put(self._starting.append).result()
        return says

    def ask(self, question: object) -> "Future[Any]":
        """Its reply, or Stopped. Fails with StartError if no process can be started."""
        pickled = pickle.dumps(question)
        return self._put(lambda answer: self._waiting.update({next(self._numbers): _Asked(pickled, answer)}))

    def _put(self, where: Callable[["Future[Any]"], None]) -> "Future[Any]":
        answer: Future[Any] = Future()
        with self._changed:
            if self._is_closed:
                raise ValueError("this pool is closed")
            where(answer)
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name=f"pool {self._command[0]}", daemon=True)
                self._thread.start()
            self._wake()
        return answer

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def close(self) -> None:
        """Ends the processes; what has no reply fails. A second call does nothing."""
        with self._changed:
            if self._is_closed:
                return
            self._is_closed = True
            self._wake()
        if self._thread is not None:
            self._thread.join()
        os.close(self._wake_in)
        os.close(self._wake_out)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: it will wake
            os.write(self._wake_out, b"x")

    def _serve(self) -> None:
        why: Exception = ValueError("this pool is closed")
        try:
            while not self._is_closed:
                try:
                    self._start_and_ask()
                    self._wait()
                except StartError as e:
                    self._fail(e)
        except Exception as e:
            why = e
        with self._changed:
            self._thread = None  # of a pool that goes on, the next question starts another
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.end()
        self._processes = []
        self._fail(why)
        for asked in self._asked.values():
            asked.answer.set_exception(why)
        self._asked = {}

    def _fail(self, e: Exception) -> None:
        """What waits for a process."""
        with self._changed:
            failed = [*(_Asked(b"", answer) for answer in self._starting), *self._waiting.values()]
            self._starting.clear()
            self._waiting.clear()
        for asked in failed:
            if asked.begin():
                asked.answer.set_exception(e)

    def _start_and_ask(self) -> None:
        with self._changed:
            at_once = max([p.says.get(AT_ONCE, 1) for p in self._processes if p.says], default=1)
            needed = max(-(-(len(self._waiting) + len(self._asked)) // at_once), bool(self._starting))
            # One alone, until it says how many questions it takes.
            most = self._num_processes if any(p.says for p in self._processes) else 1
            while len(self._processes) < min(needed, most):
                self._processes.append(self._started())
            for process in self._processes:
                if process.says is not None:
                    for answer in self._starting:
                        if answer.set_running_or_notify_cancel():
                            answer.set_result(process.says)
                    self._starting.clear()
                while self._waiting and process.room:
                    number = next(iter(self._waiting))
                    asked = self._waiting.pop(number)
                    if asked.begin():
                        self._asked[number] = asked
                        process.ask(number, asked.question)

    def _started(self) -> _Process:
        try:
            return _Process(self._command, self._limits)
        except OSError as e:
            raise StartError(f"a process of {' '.join(self._command)} did not start: {e}") from e

    def _wait(self) -> None:
        """For what processes say, for their deadlines, or to be woken."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_in, selectors.EVENT_READ)
            for p in self._processes:
                p.send()
                selector.register(p.replies, selectors.EVENT_READ, p)
                if not p.has_closed_prints:
                    selector.register(p.prints, selectors.EVENT_READ, p)
                if p.is_sending:
                    selector.register(p.questions, selectors.EVENT_WRITE, p)
            end = min((p.deadline for p in self._processes), default=math.inf)
            ready = selector.select(None if end == math.inf else max(end - time.monotonic(), 0))
        objects = {key.fileobj for key, _ in ready}
        if self._wake_in in objects:
            os.read(self._wake_in, _CHUNK_BYTES)
        for process in list(self._processes):
            if process.prints in objects:
                process.listen()
            if process.replies in objects:
                self._take(process)
            elif time.monotonic() >= process.deadline:
                self._end(process, process.limit)

    def _take(self, process: _Process) -> None:
        said = process.receive()
        if said is None:
            self._end(process)
            return
        for number, each in said:
            if process.says is None:
                process.says = each
                continue
            reply, stopped = each
            del process.asked[number]
            process.has_answered = True
            self._asked.pop(number).answer.set_result(reply if stopped is None else Stopped(stopped, is_limit=True))

    def _end(self, process: _Process, over: str | None = None) -> None:
        was_asked = process.asked and not (over is None and process.has_read_nothing())
        stopped = process.end(over)
        self._processes.remove(process)
        for number in process.asked:
            asked = self._asked.pop(number)
            if was_asked:
                asked.answer.set_result(stopped)
                continue
            with self._changed:
                self._waiting[number] = asked
        if process.says is None or not (process.has_answered or was_asked):  # the next one might end so, too
            what = "did not start" if process.says is None else "died before its first question"
            print(stopped.printed, end="", file=sys.stderr, flush=True)
            said = "".join(f": {line}" for line in stopped.printed.strip().splitlines()[-1:])
            raise StartError(
                f"a process of {self._command[0]} {what}: {stopped.cause}{said}. Remedy: {self._remedy}, or relieve "
                "the machine"
            )
