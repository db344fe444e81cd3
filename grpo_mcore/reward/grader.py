"""Responses -> rewards: 1 if the answer that it states is the gold one, else 0, by one of verifiers.py.

What text cannot decide is compared in processes that the clock can kill (killable.py), started when first needed and
then kept. What runs out of processor time, clock or memory is a wrong answer with a status of its own, because the
number of those is a metric: a grader that is too tight makes wrong zeros.
"""

import enum
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from grpo_mcore.config import config
from grpo_mcore.reward import grading_process
from grpo_mcore.reward.grading_process import Question
from grpo_mcore.reward.killable import Limits, Stopped
from grpo_mcore.reward.verifiers import VERIFIERS

MAX_GOLD_CHARS = 4096


class Status(enum.StrEnum):
    """Why a response got its reward. A verifier gives 1 for CORRECT and 0 for the others; a function of the user's own
    has the last four, of which only SCORED comes with a value."""

    CORRECT = "correct"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"  # no balanced, non-blank box of at most MAX_BOX_CHARS characters
    TRUNCATED = "truncated"  # the same, of a response that hit its length limit
    TIMED_OUT = "timed_out"  # the comparison was stopped or crashed; the verdict's detail names the limit
    FAILED = "failed"  # the function raised, crashed, returned what is no number, or is not asked for a while
    NOT_APPLICABLE = "not_applicable"  # the function returned None
    SCORED = "scored"


@dataclass(frozen=True)
class Part:
    """What one of reward.functions says of one response."""

    name: str
    value: float | None  # None: it does not apply, or there is none
    status: Status
    detail: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)  # what else it says: numbers and short texts


@dataclass(frozen=True)
class Verdict:
    r"""The grade of one response.

    >>> Verdict(1.0, Status.CORRECT, r"\sqrt{16}", "equal by math-verify")                 # gold 4
    >>> Verdict(0.0, Status.WRONG, "12", "not equal by text")                              # gold 13
    >>> Verdict(0.0, Status.TRUNCATED, None, r"no \boxed{} of 1 to 512 characters after the first </think>")
    >>> Verdict(0.0, Status.TIMED_OUT, "9^{9^{9^9}}", "killed after cpu_s = 2 s of processor time")
    """

    reward: float
    status: Status
    answer: str | None  # what the box holds, as written
    detail: str  # the rule that decided
    other: "Verdict | None" = None  # the other verifier's, where both are asked
    parts: tuple[Part, ...] = ()  # of reward.functions, in their order

    @property
    def is_disputed(self) -> bool:
        return self.other is not None and self.other.reward != self.reward


class Grader:
    """Grades responses; a context manager. Any thread may ask.

    Of its section, cpu_s and wall_s are of one comparison; start-up does not count. memory_bytes is each process's
    address space, of which importing sympy takes about 64 MiB. With compare_verifiers the other verifier's verdict
    stands in Verdict.other. require_think does not ask for the opening tag: chat templates put it into the prompt.
    """

    def __init__(self, cfg: config.Reward):
        if cfg.verifier not in VERIFIERS:
            raise ValueError(f"verifier = {cfg.verifier!r}: must be one of {', '.join(VERIFIERS)}")
        if cfg.num_processes < 1:
            raise ValueError(f"num_processes = {cfg.num_processes}: must be at least 1")
        if not 0 < cfg.cpu_s <= cfg.wall_s < math.inf:
            raise ValueError(
                f"cpu_s = {cfg.cpu_s}, wall_s = {cfg.wall_s}: must be positive, finite, and cpu_s <= wall_s, since a "
                "process never has more processor time than clock time. Remedy: raise wall_s"
            )
        if cfg.memory_bytes < 1:
            raise ValueError(f"memory_bytes = {cfg.memory_bytes}: must be positive")
        self._cfg = cfg
        other = "math_verify" if cfg.verifier == "boxed" else "boxed"
        self._verifiers = [cfg.verifier, *([other] if cfg.compare_verifiers else [])]
        self._pool = grading_process.pool(Limits(cfg.cpu_s, cfg.wall_s, cfg.memory_bytes), cfg.num_processes)

    def grade(self, items: Sequence[tuple[str, str, bool]]) -> list[Verdict]:
        """One verdict for each (response text, gold answer, truncated), in order.

        A truncated response is graded like any other: it may hold its box already. Equal questions are asked once.
        ValueError if a gold answer is not a string of 1 to MAX_GOLD_CHARS characters, or the grader is closed.
        StartError, a RuntimeError, if a process cannot start.
        """
        if self._pool.is_closed:
            raise ValueError("this Grader is closed")
        for index, (_, gold, _) in enumerate(items):
            if not isinstance(gold, str) or not gold.strip() or len(gold) > MAX_GOLD_CHARS:
                raise ValueError(
                    f"items[{index}]: the gold answer is {str(gold)[:80]!r} ({type(gold).__name__}): must be a "
                    f"non-blank string of at most {MAX_GOLD_CHARS} characters"
                )
        graded = [[self._read(name, *item) for name in self._verifiers] for item in items]
        questions = dict.fromkeys(entry for row in graded for entry in row if isinstance(entry, Question))
        replies = {question: self._pool.ask(question) for question in questions}
        try:
            verdicts = [
                [_verdict(entry, replies[entry].result()) if isinstance(entry, Question) else entry for entry in row]
                for row in graded
            ]
        except BaseException:  # Ctrl-C among them
            for reply in replies.values():
                reply.cancel()
            raise
        return [replace(mine, other=others[0]) if others else mine for mine, *others in verdicts]

    def _read(self, name: str, text: str, gold: str, truncated: bool) -> Verdict | Question:
        """The verdict or, if it takes algebra, the question."""
        none = Status.TRUNCATED if truncated else Status.NO_ANSWER
        if self._cfg.require_think and "</think>" not in text:
            return Verdict(0.0, none, None, "no </think>")
        answer = VERIFIERS[name].extract(text)
        if answer is None:
            return Verdict(0.0, none, None, VERIFIERS[name].missing)
        question, (equal, rule) = Question(name, answer, gold), VERIFIERS[name].compare_text(answer, gold)
        return question if equal is None else _verdict(question, (equal, rule))

    def close(self) -> None:
        """Ends the processes; a second call does nothing."""
        self._pool.close()

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


OF_VERIFIERS = (Status.CORRECT, Status.WRONG, Status.NO_ANSWER, Status.TRUNCATED, Status.TIMED_OUT)
NO_VALUE = (Status.FAILED, Status.TIMED_OUT, Status.NOT_APPLICABLE)  # the worst first
OF_FUNCTIONS = (Status.SCORED, *NO_VALUE)


def counts(statuses: Sequence[Status], of: Sequence[Status] = OF_VERIFIERS) -> dict[str, int]:
    """How many there are of each: {"correct": 3, "wrong": 1, "no_answer": 0, ...}."""
    number = Counter(statuses)
    return {status.value: number[status] for status in of}


def _verdict(question: Question, reply: tuple[bool, str] | Stopped) -> Verdict:
    if isinstance(reply, Stopped):
        return Verdict(0.0, Status.TIMED_OUT, question.answer, reply.cause)
    equal, rule = reply
    if equal:
        return Verdict(1.0, Status.CORRECT, question.answer, f"equal by {rule}")
    return Verdict(0.0, Status.WRONG, question.answer, f"not equal by {rule}")
