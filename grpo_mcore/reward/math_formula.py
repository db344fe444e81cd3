r"""Whether two formulas are equal, by algebra. math-verify reads them; it does not compare them, since it rounds to six
places whatever the size of the numbers, and takes the letters of a word for a product.

A difference is looked at as a number: exactly where it simplifies by itself, else to as many digits as it takes to see
that it is not 0 (at most _DIGITS). One with letters is looked at in a few points of both signs, where 0 in all of them
is 0; what has no values there (f(x), a sum that stays one) is equal only if the difference simplifies to 0.

A hostile formula can take for ever: see math_answer.py.
"""

import functools
import re
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from grpo_mcore.reward import math_number

if TYPE_CHECKING:
    import sympy

_DIGITS = 1000
_DIGITS_IN_A_POINT = 100
# Of neither sign, around 1, without a pattern that a formula could share.
_POINTS = ((17, 23, 1), (-29, 31, -1), (41, 13, -1), (-7, 19, 1))

_COMMANDS = frozenset(
    r"""frac sqrt cdot times div pi ln log exp sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh infty binom
    sum prod int lim to lfloor rfloor lceil rceil alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota
    kappa lambda mu nu xi rho sigma tau phi varphi chi psi omega Gamma Delta Theta Lambda Sigma Phi Psi Omega begin end
    pmatrix bmatrix matrix circ""".split()
)
_COMMAND = re.compile(r"\\([a-zA-Z]+)")
_READABLE = re.compile(r"(?:\\[a-zA-Z\\]|[A-Za-z0-9+\-*/^_(){}\[\].|!&= ])+")
_PROSE = re.compile(r"(?<![\\a-zA-Z])[A-Za-z]{2,} [A-Za-z]|(?<![\\a-zA-Z])[A-Za-z] [A-Za-z]{2,}")
_NUMBER_WITH_INDEX = re.compile(r"(?<![A-Za-z_{])\d+_")  # the parser drops the index of 90_n
_DEGREES = re.compile(r"(\d+|\{\\frac\{\d+\}\{\d+\}\})\^(?:\{\\circ\}|\\circ)")
# What stands before a factor: 2(3), (2)(3) and \binom{3}{2}2 are mixed numbers to the parser, 2 + 3.
_FACTORS = re.compile(
    r"(?<![\d^_])\d+(?=\(|\\binom)|\\pi(?=\()|\)(?=[(\d]|\\(?:frac|binom|sqrt))|\}(?=\\(?:frac|binom))"
    r"|\\binom\{[^{}]*\}\{[^{}]*\}(?=[(\d]|\\(?:frac|binom|sqrt))"
)


def can_be_read(text: str) -> bool:
    """Whether it is a formula, and not prose, a name (\angle ABC) or a notation that the parser would misread."""
    exact = math_number.exactly(text)
    return (
        _READABLE.fullmatch(exact) is not None
        and not _NUMBER_WITH_INDEX.search(exact)
        and not _PROSE.search(re.sub(r" d[a-z]\b", "", exact))  # as in x dx
        and all(command in _COMMANDS for command in _COMMAND.findall(exact.replace(r"\\", " ")))
    )


def are_equal(mine: str, truth: str) -> bool:
    """Of formulas in math_spelling.py's spelling. What cannot be read is not equal."""
    try:
        one, other = _parse(mine), _parse(truth)
        return one is not None and other is not None and (_rounds(mine, other, truth, one) or _same(one, other))
    except Exception:  # the parser and sympy raise whatever they like, on what makes no sense
        return False


def are_proportional(mine: str, truth: str, positive: bool) -> bool:
    """Whether one is a constant multiple of the other, by a positive number if that is asked. Neither may be 0."""
    try:
        one, other = _parse(mine), _parse(truth)
        return one is not None and other is not None and _is_multiple(one, other, positive)
    except Exception:  # as above
        return False


def _rounds(mine: str, other: Any, truth: str, one: Any) -> bool:
    """Whether one of them is a decimal that stands for the other."""
    for text, formula in ((mine, other), (truth, one)):
        number = math_number.read_number(text)
        if number is not None and math_number.can_stand_for_another(number):
            value = _value(formula, (number.places or 0) + 20)
            if value is not None and math_number.stands_for(number, value):
                return True
    return False


def _is_multiple(one: Any, other: Any, positive: bool) -> bool:
    import sympy

    names = sorted(one.free_symbols, key=str)
    if not names or one.free_symbols != other.free_symbols or isinstance(one, sympy.MatrixBase):
        return False
    point = _points(names)[0]
    below = other.xreplace(point)
    if _is_zero(below) is not False:
        return False
    ratio = one.xreplace(point) / below
    if _is_zero(ratio) is not False or (positive and not ratio.evalf().is_positive):
        return False
    return _is_zero(one - ratio * other) is True


@functools.lru_cache(maxsize=1024)  # the responses of a group share their gold answer
def _parse(text: str) -> "sympy.Expr | sympy.MatrixBase | None":
    """Exact: decimals are fractions. R and r are two letters, which math-verify takes for one; i is the imaginary unit
    except as an index."""
    from math_verify import parse  # imports sympy: hundreds of milliseconds
    from sympy import Expr, I, Integral, MatrixBase, Product, Rational, Sum, Symbol
    from sympy.core.function import AppliedUndef

    number = math_number.read_number(text)
    if number is not None:
        return Rational(number.value.numerator, number.value.denominator)
    exact = _FACTORS.sub(r"\g<0>\\cdot ", math_number.exactly(text))
    exact = _DEGREES.sub(r"(\\frac{\1\\pi}{180})", exact)
    found = parse(f"${_small_letters(exact)}$", extraction_config=_latex_only(), parsing_timeout=None)
    formula: Any = found[0] if found else None
    if not isinstance(formula, (Expr, MatrixBase)):
        return None
    has_index = formula.has(Sum, Product, Integral)
    formula = formula.doit()
    formula = formula.replace(lambda part: isinstance(part, AppliedUndef), lambda part: Symbol(str(part)))
    names = {name: Symbol(name.name) for name in formula.free_symbols if isinstance(name, Symbol)}
    if not has_index:
        names.update({name: I for name in names if name.name == "i"})
    replaced: sympy.Expr | sympy.MatrixBase = formula.xreplace(names)
    return replaced


def _small_letters(text: str) -> str:
    """R_{1} -> r_{9991}: as good a name as any, of a letter that the parser leaves alone."""

    def small(match: re.Match[str]) -> str:
        letter = match.group()[0]
        return match.group() if letter == "\\" else rf"{letter.lower()}_{{999{match[1] or match[2] or ''}}}"

    return re.sub(r"\\[a-zA-Z]+|[A-Z](?:_(?:\{([^{}]*)\}|(\w)))?", small, text)


@functools.lru_cache(maxsize=1)
def _latex_only() -> tuple[object, ...]:
    """math-verify's configuration: the whole text is one formula; no search for numbers in prose, no units."""
    import dataclasses

    from math_verify import LatexExtractionConfig

    config = LatexExtractionConfig(boxed_match_priority=-1)
    spelling = dataclasses.replace(config.normalization_config, units=False, boxed="none")
    return (dataclasses.replace(config, normalization_config=spelling),)


def _same(one: Any, other: Any) -> bool:
    import sympy

    if one.has(sympy.nan, sympy.zoo) or other.has(sympy.nan, sympy.zoo):
        return False
    if one == other:
        return True
    if isinstance(one, sympy.MatrixBase) or isinstance(other, sympy.MatrixBase):
        return (
            isinstance(one, sympy.MatrixBase)
            and isinstance(other, sympy.MatrixBase)
            and one.shape == other.shape
            and all(_same(a, b) for a, b in zip(one.flat(), other.flat(), strict=True))
        )
    if not (one.is_finite is not False and other.is_finite is not False):
        return False
    difference = one - other
    zero = _is_zero(difference)
    return bool(sympy.simplify(difference) == 0) if zero is None else zero


def _is_zero(formula: Any) -> bool | None:
    """None: it has no value, with numbers in the place of its letters."""
    names = sorted(formula.free_symbols, key=str)
    if not names:
        return _is_zero_number(formula, _DIGITS)
    zeros = 0
    for point in _points(names):
        zero = _is_zero_number(formula.xreplace(point), _DIGITS_IN_A_POINT)
        if zero is False:
            return False
        zeros += zero is True
    return True if zeros > 1 else None


def _points(names: list[Any]) -> list[dict[Any, Any]]:
    """Four of them; each letter has its own value in each."""
    import sympy

    return [
        {name: sympy.Rational(a + 4 * index, b) * sign**index for index, name in enumerate(names)}
        for a, b, sign in _POINTS
    ]


def _is_zero_number(formula: Any, digits: int) -> bool | None:
    value = formula.evalf(5, maxn=digits)
    if not value.is_number or value.has(*_no_numbers()):
        return None
    parts = value.as_real_imag()
    if not all(part.is_Float or part.is_Rational for part in parts):
        return None
    # A Float of one bit of precision is what is left where all digits cancel.
    return all(part == 0 or (part.is_Float and part._prec == 1) for part in parts)


def _no_numbers() -> tuple[Any, ...]:
    import sympy

    return sympy.nan, sympy.zoo, sympy.oo, -sympy.oo


def _value(formula: Any, digits: int) -> Fraction | None:
    """A real number to so many digits after the point."""
    import sympy

    if not isinstance(formula, sympy.Expr) or formula.free_symbols:
        return None
    size = formula.evalf(5)
    if not size.is_Float and not size.is_Rational:
        return None
    scaled = (formula * sympy.Integer(10) ** digits).round()
    return Fraction(int(scaled), 10**digits) if scaled.is_Integer else None
