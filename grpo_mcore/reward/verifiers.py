r"""What decides whether an answer is right, by name: reward.verifier.

math_verify    math_answer.py: numbers exactly, formulas as math-verify reads them
boxed          boxed_answer.py: the rules of the original DeepScaleR run
"""

from collections.abc import Callable
from dataclasses import dataclass

from grpo_mcore.reward import boxed_answer, math_answer


@dataclass(frozen=True)
class Verifier:
    extract: Callable[[str], str | None]  # a response's text -> what its answer's box holds
    normalise: Callable[[str], str]  # an answer -> one spelling of it
    # (answer, gold) -> (equal, the rule that decided); None: it takes algebra. Safe anywhere
    compare_text: Callable[[str, str], tuple[bool | None, str]]
    compare: Callable[[str, str], tuple[bool, str]]  # the same, decided; may run for ever


def _math_verify_text(answer: str, gold: str) -> tuple[bool | None, str]:
    return math_answer.is_equal_as_text(answer, gold), "text"


def _math_verify(answer: str, gold: str) -> tuple[bool, str]:
    return math_answer.is_equal(answer, gold), "math-verify"


VERIFIERS = {
    "math_verify": Verifier(math_answer.extract_boxed, math_answer.normalise, _math_verify_text, _math_verify),
    "boxed": Verifier(
        boxed_answer.extract_boxed, boxed_answer.normalise, boxed_answer.compare_text, boxed_answer.compare
    ),
}
