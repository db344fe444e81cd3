r"""Responses -> rewards: 1 if the last box holds the gold answer, else 0, by one of verifiers.py.

What text cannot decide is compared in processes that the clock can kill (killable.py), started when first needed and
then kept. What runs out of processor time, clock or memory is a wrong answer with a status of its own, because the
number of those is a metric: a grader that is too tight makes wrong zeros.
"""

import enum
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from grpo_mcore.config import config
from grpo_mcore.reward import grading_process
from grpo_mcore.reward.grading_process import Question
from grpo_mcore.reward.killable import Limits, Stopped
from grpo_mcore.reward.math_answer import MAX_BOX_CHARS
from grpo_mcore.reward.verifiers import VERIFIERS

MAX_GOLD_CHARS = 4096


class Status(enum.StrEnum):
    """Why a response got its reward: 1 for CORRECT, 0 for the others."""

    CORRECT = "correct"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"  # no balanced, non-blank box of at most MAX_BOX_CHARS characters
    TRUNCATED = "truncated"  # the same, of a response that hit its length limit
    TIMED_OUT = "timed_out"  # the comparison was stopped or crashed; the verdict's detail names the limit


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
        self._verifiers = [cfg.verifier, *(n for n in VERIFIERS if n != cfg.verifier and cfg.compare_verifiers)]
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
            detail = rf"no \boxed{{}} of 1 to {MAX_BOX_CHARS} characters after the first </think>"
            return Verdict(0.0, none, None, detail)
        question, (equal, rule) = Question(name, answer, gold), VERIFIERS[name].compare_text(answer, gold)
        return question if equal is None else _verdict(question, (equal, rule))

    def close(self) -> None:
        """Ends the processes; a second call does nothing."""
        self._pool.close()

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


def counts(verdicts: Sequence[Verdict]) -> dict[str, int]:
    """How many verdicts have each status; every status is a key: {"correct": 3, "wrong": 1, "no_answer": 0, ...}."""
    number = Counter(verdict.status for verdict in verdicts)
    return {status.value: number[status] for status in Status}


def _verdict(question: Question, reply: tuple[bool, str] | Stopped) -> Verdict:
    if isinstance(reply, Stopped):
        return Verdict(0.0, Status.TIMED_OUT, question.answer, reply.cause)
    equal, rule = reply
    if equal:
        return Verdict(1.0, Status.CORRECT, question.answer, f"equal by {rule}")
    return Verdict(0.0, Status.WRONG, question.answer, f"not equal by {rule}")
