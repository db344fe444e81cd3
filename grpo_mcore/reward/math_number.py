r"""Numbers as text gives them: exact values, and what a decimal that was rounded may stand for. Pure, without sympy.

A decimal is the number that its digits say. It also stands for a number that it is the rounding of, or the first digits
of, if it gives at least MIN_DIGITS digits after the point and as many significant ones: 0.333333 is 1/3, and 0.333,
0.333334 and 0.0000003 are not. So nothing is compared to an absolute or relative tolerance.
"""

import functools
import re
from fractions import Fraction
from typing import NamedTuple

MIN_DIGITS = 6
"""Fewer digits are what a problem asks to round to, and no proof that the number was found."""
_MAX_CHARS = 4000  # Python reads no longer integers
_MAX_EXPONENT = 999  # of a power of ten that is written out; a larger one is left to the algebra

_FRACTION = r"\\frac\{(?P<top>-?\d+)\}\{(?P<bottom>-?\d+)\}|\\frac(?P<top1>\d)(?P<bottom1>\d)"
_TIMES_TEN = (
    r"(?P<times>(?:\\times|\\cdot|\*) ?10\^(?:\{(?P<braced>[+-]?\d+)\}|(?P<bare>\d)(?!\d))|[eE](?P<e>[+-]?\d+))"
)
_NUMBER = re.compile(
    r"(?P<sign>[+-]?)(?:"
    r"(?P<slash_top>\d+)/(?P<slash_bottom>\d+)"
    rf"|(?P<whole>\d+)? ?(?:{_FRACTION})"
    rf"|(?P<integer>\d*)(?:\.(?P<digits>\d*)(?:\\(?:overline|bar|dot) ?\{{?(?P<repeated>\d+)\}}?)?)?{_TIMES_TEN}?"
    r")(?P<percent>\\%)?"
)
DECIMAL = re.compile(r"(?<![\d.])(?:\d+\.\d*|\.\d+)(?:\\(?:overline|bar|dot) ?(?:\{\d+\}|\d))?")
"""A decimal within a formula."""


class Number(NamedTuple):
    value: Fraction
    places: int | None  # digits after the point, of what may have been rounded; None: exact


@functools.lru_cache(maxsize=4096)
def read_number(text: str) -> Number | None:
    r"""An integer, decimal, fraction of integers, mixed number or power of ten times a decimal, perhaps with a percent
    sign, in math_spelling.py's spelling; None for anything else.

    >>> [str(read_number(t).value) for t in ("0.5", r"0.1\overline{6}", r"1\frac{1}{2}", r"12.5\%", "1.5e3")]
    ['1/2', '1/6', '3/2', '1/8', '1500']
    """
    found = _NUMBER.fullmatch(text) if len(text) <= _MAX_CHARS else None
    if not found or not any(character.isdigit() for character in text):
        return None
    number = _fraction(found) if found["slash_top"] or found["top"] or found["top1"] else _decimal(found)
    if number is None:
        return None
    value, places = number
    if found["percent"]:
        value, places = value / 100, places and places + 2
    return Number(-value if found["sign"] == "-" else value, places)


def _fraction(found: re.Match[str]) -> Number | None:
    r"""None for 1/0, and for 2\frac{-1}{3}, which is a product or a slip and no mixed number."""
    top, bottom = (int(found[f"slash_{end}"] or found[end] or found[f"{end}1"]) for end in ("top", "bottom"))
    if bottom == 0 or (found["whole"] and top * bottom < 0):
        return None
    return Number(int(found["whole"] or 0) + Fraction(top, bottom), None)


def _decimal(found: re.Match[str]) -> Number | None:
    integer, digits, repeated = found["integer"], found["digits"] or "", found["repeated"]
    exponent = int(found["braced"] or found["bare"] or found["e"] or 0)
    if not (integer or digits or repeated) or abs(exponent) > _MAX_EXPONENT:
        return None
    value = Fraction(int(integer + digits or "0"), 10 ** len(digits))
    if repeated:
        value += Fraction(int(repeated), (10 ** len(repeated) - 1) * 10 ** len(digits))
    may_be_rounded = digits and not repeated and not found["times"]
    return Number(value * Fraction(10) ** exponent, len(digits) if may_be_rounded else None)


def are_equal(one: Number, other: Number) -> bool:
    return one.value == other.value or stands_for(one, other.value) or stands_for(other, one.value)


def can_stand_for_another(number: Number) -> bool:
    """Whether it is a decimal with digits enough to be a rounding."""
    return (
        number.places is not None
        and number.places >= MIN_DIGITS
        and abs(number.value) * 10**number.places >= 10 ** (MIN_DIGITS - 1)
    )


def stands_for(number: Number, value: Fraction) -> bool:
    """Whether `number` is `value` rounded, or cut off, to the digits that it gives."""
    if not can_stand_for_another(number) or (value < 0) != (number.value < 0):
        return False
    scale = 10 ** (number.places or 0)
    given, exact = abs(number.value) * scale, abs(value) * scale
    return given in (exact.__floor__(), (exact + Fraction(1, 2)).__floor__())


def exactly(text: str) -> str:
    r"""A formula with its decimals as fractions, so that the algebra never rounds: 0.5x is \frac{5}{10}x."""

    def as_fraction(match: re.Match[str]) -> str:
        number = read_number(match.group())
        return (
            match.group() if number is None else rf"{{\frac{{{number.value.numerator}}}{{{number.value.denominator}}}}}"
        )

    return DECIMAL.sub(as_fraction, text)
