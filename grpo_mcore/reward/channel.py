"""The own side of a process that answers questions and can be killed; the other one is killable.py.

Protocol: frames, of a number, a length and so many bytes. The process sends JSON: number 0 with what it says of itself
when it is ready; then, under the number of each pickled question, [reply, what stopped it or null].
"""

import asyncio
import json
import os
import pickle
import resource
import signal
import struct
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import psutil

HEADER = struct.Struct("<QQ")  # number, length
AT_ONCE = "at_once"  # what a process says of itself: how many questions it takes at a time; 1 if it says nothing
ORPHAN_S = 2.0  # how often a process looks whether its parent is still there


class Channel:
    """The pipes to the parent."""

    def __init__(self) -> None:
        """Nothing that is printed afterwards, or read from stdin, meets the protocol."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
        signal.signal(signal.SIGPROF, signal.SIG_DFL)  # the default action ends the process, also inside C code
        signal.pthread_sigmask(signal.SIG_SETMASK, ())  # both survive an exec
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        self._questions = os.fdopen(os.dup(0), "rb")
        self._replies = os.dup(1)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(2, 1)
        self._sending = threading.Lock()
        threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()

    def ready(self, **says: object) -> None:
        self._say(0, says)

    def _say(self, number: int, tree: object) -> None:
        said = json.dumps(tree).encode()
        frame = HEADER.pack(number, len(said)) + said
        with self._sending:
            while frame:
                frame = frame[os.write(self._replies, frame) :]

    def _read(self) -> tuple[int, Any] | None:
        """(number, question); None when the parent is gone."""
        header = self._questions.read(HEADER.size)
        if len(header) < HEADER.size:
            return None
        number, size = HEADER.unpack(header)
        return number, pickle.loads(self._questions.read(size))

    def serve(self, answer: Callable[[Any], object], cpu_s: float) -> None:
        """One question after the other, until the parent is gone."""
        while (asked := self._read()) is not None:
            number, question = asked
            signal.setitimer(signal.ITIMER_PROF, cpu_s)
            reply = answer(question)
            signal.setitimer(signal.ITIMER_PROF, 0)
            self._say(number, [reply, None])

    async def serve_many(self, answer: Callable[[Any], Awaitable[object]], wall_s: float) -> None:
        """As many at once as are asked, until the parent is gone."""
        loop, arrived = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Any] | None]()

        def read() -> None:
            asked: tuple[int, Any] | None = (0, None)
            while asked is not None:
                asked = self._read()
                loop.call_soon_threadsafe(arrived.put_nowait, asked)

        async def reply(number: int, question: object) -> None:
            try:
                self._say(number, [await asyncio.wait_for(answer(question), wall_s), None])
            except TimeoutError:
                self._say(number, [None, f"stopped after wall_s = {wall_s:g} s of clock time"])

        threading.Thread(target=read, daemon=True).start()
        tasks = set()
        while (asked := await arrived.get()) is not None:
            task = asyncio.create_task(reply(*asked))
            tasks.add(task)
            task.add_done_callback(tasks.discard)


def _follow(parent: int) -> None:
    """Ends the process when its parent is gone: a fork of the parent may hold the other end of the pipes, and a
    question may wait for ever."""
    while os.getppid() == parent:
        time.sleep(ORPHAN_S)
    os._exit(0)


def limit_memory(num_bytes: int) -> None:
    """What this process may take beyond what it has taken."""
    limit(resource.RLIMIT_DATA, psutil.Process().memory_info().data + num_bytes)


def limit(what: int, num_bytes: int) -> None:
    """Of this process: RLIMIT_AS or RLIMIT_DATA."""
    _, most = resource.getrlimit(what)
    num_bytes = num_bytes if most == resource.RLIM_INFINITY else min(num_bytes, most)
    resource.setrlimit(what, (num_bytes, num_bytes))
