r"""What decides whether an answer is right, by name: reward.verifier.

math_verify    math_answer.py: numbers exactly, formulas as math-verify reads them
boxed          boxed_answer.py: the rules of the original DeepScaleR run
dapo, gsm8k    line_answer.py: what follows "Answer:", and the number after ####
"""

from collections.abc import Callable
from dataclasses import dataclass

from grpo_mcore.reward import boxed_answer, line_answer, math_answer


@dataclass(frozen=True)
class Verifier:
    extract: Callable[[str], str | None]  # a response's text -> the answer that it states
    normalise: Callable[[str], str]  # an answer -> one spelling of it
    # (answer, gold) -> (equal, the rule that decided); None: it takes algebra. Safe anywhere
    compare_text: Callable[[str, str], tuple[bool | None, str]]
    compare: Callable[[str, str], tuple[bool, str]]  # the same, decided; may run for ever
    stated: str = r"\boxed{%s}"  # how a response states an answer
    missing: str = rf"no \boxed{{}} of 1 to {math_answer.MAX_BOX_CHARS} characters after the first </think>"


def _math_verify_text(answer: str, gold: str) -> tuple[bool | None, str]:
    return math_answer.is_equal_as_text(answer, gold), "text"


def _math_verify(answer: str, gold: str) -> tuple[bool, str]:
    return math_answer.is_equal(answer, gold), "math-verify"


VERIFIERS = {
    "math_verify": Verifier(math_answer.extract_boxed, math_answer.normalise, _math_verify_text, _math_verify),
    "boxed": Verifier(
        boxed_answer.extract_boxed, boxed_answer.normalise, boxed_answer.compare_text, boxed_answer.compare
    ),
    "dapo": Verifier(
        line_answer.extract_dapo,
        line_answer.spell_dapo,
        line_answer.compare_dapo,
        line_answer.compare_dapo,
        "Answer: %s",
        f'no "Answer:" in the last {line_answer.LAST_CHARS} characters',
    ),
    "gsm8k": Verifier(
        line_answer.extract_gsm8k,
        line_answer.spell_gsm8k,
        line_answer.compare_gsm8k,
        line_answer.compare_gsm8k,
        "#### %s",
        f"no number after #### in the last {line_answer.LAST_CHARS} characters",
    ),
}
