"""Reward functions of the user's own, seen from the run: they are called in processes that can be killed
(function_process.py), for verl's and plain ones a response at a time, for the others a prompt's responses at once.

A function that hangs or crashes costs what it was asked about, and after STOPS_IN_A_ROW of that the rest is not asked:
then one call in a while tells whether it is well again, so that a run goes on at the speed of its other functions.
"""

import dataclasses
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grpo_mcore.config import config
from grpo_mcore.config.config import InputError
from grpo_mcore.reward.grader import Part, Status
from grpo_mcore.reward.killable import Limits, Pool, StartError, Stopped

if TYPE_CHECKING:  # the processes of functions do without torch
    from grpo_mcore.types import Outcome

STOPS_IN_A_ROW = 8
ASKED_AGAIN = 10  # times wall_s: after so long one call is tried
NUM_SHOWN = 5  # different errors of a function that are printed in full
SUSPENDED = f"not asked: the last {STOPS_IN_A_ROW} calls were stopped"


@dataclass(frozen=True)
class Case:
    """Responses to one prompt, as a function is asked about them."""

    problem: Any  # its cell of the data set: a text or messages
    answer: Any  # the right one; None: the data set has none
    row: Mapping[str, Any]  # all columns
    source: str  # the data set's name
    texts: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    truncated: tuple[bool, ...]
    outcomes: "tuple[Outcome | None, ...]" = ()  # of sessions; none without an environment


class Function:
    """One of reward.functions; a context manager. `name` is the configuration's field, for errors."""

    def __init__(self, cfg: config.RewardFunction, reward: config.Reward, name: str):
        """Loads it, in a process. Raises InputError."""
        self.label, self._cfg, self._name = cfg.label, cfg, name
        self._limits = Limits(cfg.cpu_s or reward.cpu_s, cfg.wall_s or reward.wall_s, reward.memory_bytes)
        limits = json.dumps(dataclasses.astuple(self._limits))
        self._pool = Pool(
            ("grpo_mcore.reward.function_process", cfg.path, cfg.style, limits),
            self._limits,
            num_processes=reward.num_processes,
            remedy="mend what it imports",
        )
        try:
            says = self._pool.says()
        except StartError as e:
            says = {"error": str(e)}
        if "error" in says:
            self._pool.close()
            raise InputError(
                f"{name}.path", cfg.path, f"cannot be used: {says['error']}", "mend the function or the path"
            )
        self.style: str = says["style"]
        self._changed = threading.Lock()  # guards what follows
        self._asked: set[Future[Any]] = set()
        self._stops = 0  # in a row
        self._ask_again_at = 0.0
        self._shown: set[str] = set()

    def __enter__(self) -> "Function":
        return self

    def __exit__(self, *_exception: object) -> None:
        self._pool.close()

    def ask(self, case: Case) -> "Asked":
        """Asks now, and is waited for as the parts are taken."""
        cases = list(_one_by_one(case)) if self.style in ("verl", "plain") else [case]
        return Asked(self, [(each, self._ask(each)) for each in cases])

    def _ask(self, case: Case) -> "Future[Any] | None":
        """None: it is not asked."""
        with self._changed:
            if self._stops >= STOPS_IN_A_ROW:
                if time.monotonic() < self._ask_again_at:
                    return None
                self._ask_again_at = time.monotonic() + ASKED_AGAIN * self._limits.wall_s
            answer = self._pool.ask(case)
            self._asked.add(answer)
        answer.add_done_callback(self._done)
        return answer

    def _done(self, answer: "Future[Any]") -> None:
        with self._changed:
            self._asked.discard(answer)
            if answer.cancelled() or answer.exception():
                return
            self._stops = self._stops + 1 if isinstance(answer.result(), Stopped) else 0
            if self._stops != STOPS_IN_A_ROW:
                return
            self._ask_again_at = time.monotonic() + ASKED_AGAIN * self._limits.wall_s
            waiting = list(self._asked)
        for other in waiting:
            other.cancel()  # nothing becomes of it where it is being worked on

    def parts_of(self, case: Case, answer: "Future[Any] | None") -> list[Part]:
        """Raises StartError."""
        try:
            reply = answer.result() if answer is not None else None
        except CancelledError:
            reply = None
        if reply is None:
            return [Part(self.label, None, Status.FAILED, SUSPENDED)] * len(case.texts)
        if isinstance(reply, Stopped):
            self._show(case, reply.cause, reply.printed)
            status = Status.TIMED_OUT if reply.is_limit else Status.FAILED
            return [Part(self.label, None, status, reply.cause)] * len(case.texts)
        if isinstance(reply, dict):
            detail = reply["error"].splitlines()[-1]
            self._show(case, detail, reply["error"])
            return [Part(self.label, None, Status.FAILED, detail)] * len(case.texts)
        return [
            Part(self.label, value, Status.NOT_APPLICABLE if value is None else Status.SCORED, "", extra)
            for value, extra in reply
        ]

    def _show(self, case: Case, detail: str, words: str) -> None:
        """Once, and of many different ones the first."""
        with self._changed:
            if detail in self._shown or len(self._shown) >= NUM_SHOWN:
                return
            self._shown.add(detail)
        said = "" if words.strip() in ("", detail) else f"\n{words.rstrip()}"
        print(
            f"warning: reward function {self.label}: {detail}, on a response to {case.problem!r:.200}{said}", flush=True
        )


class Asked:
    """What a function was asked: a part of each response, in their order. Raises StartError as it is iterated over."""

    def __init__(self, function: Function, questions: "Sequence[tuple[Case, Future[Any] | None]]"):
        self._function, self._questions = function, questions

    def __iter__(self) -> Iterator[Part]:
        for case, answer in self._questions:
            yield from self._function.parts_of(case, answer)

    def withdraw(self) -> None:
        """What has not been asked yet."""
        for _, answer in self._questions:
            if answer is not None:
                answer.cancel()


def _one_by_one(case: Case) -> Iterator[Case]:
    for text, ids, truncated in zip(case.texts, case.token_ids, case.truncated, strict=True):
        yield dataclasses.replace(case, texts=(text,), token_ids=(ids,), truncated=(truncated,), outcomes=())
