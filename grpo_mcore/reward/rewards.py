"""Responses -> verdicts: by reward.verifier, or by reward.functions, of which verifiers may be some."""

import contextlib
import dataclasses
from collections.abc import Sequence

from grpo_mcore.config import config
from grpo_mcore.config.config import ENVIRONMENT, InputError
from grpo_mcore.reward.functions import Case, Function
from grpo_mcore.reward.grader import NO_VALUE, Grader, Part, Status, Verdict
from grpo_mcore.types import Outcome

# A response that states an answer in every way that is common, for functions that look for one of them.
STATED = "<think>So it is {0}.</think>\n<answer>\\boxed{{{0}}}</answer>\nAnswer: {0}\n#### {0}"


class Rewards:
    """What grades a run's responses; a context manager. Any thread may ask."""

    def __init__(self, cfg: config.Reward):
        """Loads the functions. Raises InputError."""
        self._cfg = cfg
        with contextlib.ExitStack() as stack:
            self._verifiers = {
                name: stack.enter_context(Grader(dataclasses.replace(cfg, verifier=name))) for name in cfg.verifiers
            }
            self._functions = {
                f.label: stack.enter_context(Function(f, cfg, f"reward.functions[{i}]"))
                for i, f in enumerate(cfg.functions)
                if f.is_function
            }
            self._open = stack.pop_all()

    def close(self) -> None:
        self._open.close()

    def __enter__(self) -> "Rewards":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def grade(self, cases: Sequence[Case]) -> list[tuple[Verdict, ...]]:
        """The verdicts of each case's responses, in their order; all are asked at once. RuntimeError if a process
        cannot start."""
        with contextlib.ExitStack() as asked:
            of_functions = []
            for name, function in self._functions.items():
                parts = [function.ask(case) for case in cases]
                for each in parts:
                    asked.callback(each.withdraw)
                of_functions.append((name, parts))
            of_verifiers: dict[str, list[tuple[Verdict, ...]]] = {
                name: self._verify(grader, cases) for name, grader in self._verifiers.items()
            }
            if not self._cfg.functions:
                return of_verifiers[self._cfg.verifier]
            by_label = {name: [list(each) for each in parts] for name, parts in of_functions}
        for f in self._cfg.functions:
            if f.is_verifier:
                by_label[f.label] = [[_part(f.label, v) for v in verdicts] for verdicts in of_verifiers[f.path]]
            elif f.path == ENVIRONMENT:
                by_label[f.label] = [[_of_outcome(f.label, o) for o in case.outcomes] for case in cases]
        answers = next(iter(of_verifiers.values()), None)
        return [
            tuple(
                self._total(
                    [by_label[f.label][i][sample] for f in self._cfg.functions],
                    answers[i][sample].answer if answers else None,
                )
                for sample in range(len(case.texts))
            )
            for i, case in enumerate(cases)
        ]

    def _verify(self, grader: Grader, cases: Sequence[Case]) -> list[tuple[Verdict, ...]]:
        verdicts = iter(
            grader.grade([(t, c.answer, cut) for c in cases for t, cut in zip(c.texts, c.truncated, strict=True)])
        )
        return [tuple(next(verdicts) for _ in case.texts) for case in cases]

    def _total(self, parts: Sequence[Part], answer: str | None) -> Verdict:
        reward = sum(f.weight * (p.value or 0.0) for f, p in zip(self._cfg.functions, parts, strict=True))
        statuses = {p.status for p in parts}
        has_value = any(p.value is not None for p in parts)
        without = NO_VALUE[:2] if has_value else NO_VALUE
        status = next((s for s in without if s in statuses), Status.SCORED)
        detail = ", ".join(f"{p.name} {p.status if p.value is None else format(p.value, 'g')}" for p in parts)
        return Verdict(reward, status, answer, detail, parts=tuple(parts))

    def describe(self) -> str:
        """In a line: sum of 0.5 x format (trl), 1 x math_verify."""
        styles = {name: f" ({function.style})" for name, function in self._functions.items()}
        each = [f"{f.weight:g} x {f.label}{styles.get(f.label, '')}" for f in self._cfg.functions]
        return f"{self._cfg.combine} of {', '.join(each)}"

    def check(self, cases: Sequence[Case]) -> list[str]:
        """Tries each function on some rows: warnings of what fails on some. Raises InputError for a function that
        fails on all."""
        tried = [_stated(case) for case in cases]
        warnings = []
        for i, f in enumerate(self._cfg.functions):
            if not f.is_function or not tried:
                continue
            parts = [part for each in [self._functions[f.label].ask(case) for case in tried] for part in each]
            failed = [p for p in parts if p.status in NO_VALUE[:2]]
            if not failed:
                continue
            words = f"fails on {len(failed)} of {len(parts)} responses made for the first rows ({failed[0].detail})"
            if len(failed) == len(parts):
                raise InputError(f"reward.functions[{i}]", f.path, words, "mend the function")
            warnings.append(f"warning: reward.functions[{i}] = {f.path} {words}")
        return warnings


def _part(name: str, v: Verdict) -> Part:
    value = None if v.status == Status.TIMED_OUT else v.reward
    return Part(name, value, v.status, v.detail, {"answer": v.answer})


def _of_outcome(name: str, o: Outcome | None) -> Part:
    assert o is not None  # sessions end with one
    return Part(name, o.reward, Status(o.status), o.detail, o.extra)


def _stated(case: Case) -> Case:
    """With responses that state the answer, and say nothing."""
    texts = (STATED.format("" if case.answer is None else case.answer), "")
    return dataclasses.replace(case, texts=texts, token_ids=((), ()), truncated=(False, False))
