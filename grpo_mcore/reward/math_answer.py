r"""Mathematical answers: cut them out of a response, bring them to one spelling, compare them.

What decides is math-verify, with two departures from its defaults, both because a reward is easy to game:

* It never reads a response. It sees the content of one box, cut out by `extract_boxed`: in a whole response it would
  collect "\boxed{1} then \boxed{99}" as the set {1, 99}, count boxes inside the thinking, and spend quadratic time.
* It does not strip units: its own list takes single letters for units, so that 2 passes for 2s and 3m for 3g.
  `normalise` does that part, and with it mends what math-verify gets wrong (7=5 for 5, 12431_8 for 12431_7, "1 000",
  12.5%, ...).

math-verify can run for ever on a hostile answer (9^{9^{9^9}}). Its own time-out is an alarm signal, which costs seconds
of clock, cancels the caller's alarm and fails off the main thread, so it is off: call `is_equal` in a process that can
be killed (grading_process.py does). `is_equal_as_text` is the part that is safe anywhere.
"""

import functools
import re
from collections.abc import Callable
from typing import NamedTuple, TypeVar

MAX_BOX_CHARS = 512
"""Longer boxes are refused: no answer is that long, and parsing time grows faster than length."""

# An escaped brace (\{) prints a brace and does not group; "\\boxed{" is what a model writes that copied an escaped
# prompt.
_TOKEN = re.compile(r"\\\\?boxed\s*\{|\\[^a-zA-Z]|[{}]", re.DOTALL)


def extract_boxed(text: str) -> str | None:
    r"""The content of the last balanced \boxed{...} after the first </think>, or None.

    Without a </think> the whole text is read. "Last" is the box that closes last, so of nested boxes it is the outer
    one. None when there is no such box, when it is blank, or when it holds more than MAX_BOX_CHARS characters (an
    earlier, shorter box does not stand in). Time is linear in the length of the text.

    >>> extract_boxed(r"<think>\boxed{1}</think> It is \boxed{\frac{3}{4}}, not \boxed{2")
    '\\frac{3}{4}'
    """
    _, found, after = text.partition("</think>")
    body = after if found else text
    if "boxed" not in body:
        return None
    is_box = []  # one entry for each open brace: where its content starts if it opens a box, otherwise -1
    last = None
    for token in _TOKEN.finditer(body):
        mark = token.group()
        if mark.endswith("{") and mark != r"\{":
            is_box.append(token.end() if len(mark) > 1 else -1)
        elif mark == "}" and is_box:
            start = is_box.pop()
            if start >= 0:
                last = slice(start, token.start())
    if last is None or last.stop - last.start > MAX_BOX_CHARS:
        return None
    return body[last].strip() or None


class _Reading(NamedTuple):
    text: str  # LaTeX in one spelling, without its unit
    unit: str  # canonical, e.g. "cm2", "km/h"; "" where there is none


def normalise(answer: str) -> str:
    r"""One spelling for answers that mean the same, still LaTeX that math-verify reads. The unit is dropped.

    >>> [normalise(a) for a in ("$025$", r"1{,}000 \text{ cm}^2.", r"\dfrac {7}{9}", r"90^\circ", "1 1/2", "12431_7")]
    ['25', '1000', '\\frac{7}{9}', '90', '1\\frac{1}{2}', '12431_{7}']
    """
    return _read(answer).text


def is_equal_as_text(answer: str, gold: str) -> bool | None:
    """`is_equal` where no algebra is needed, None where it is. Microseconds, on any input.

    Decides: equal spellings, two integers (compared as their digits), two numbers written in a base, units that
    contradict each other, two words.
    """
    return _compare_claims(answer, gold, _compare_text)


def is_equal(answer: str, gold: str) -> bool:
    """Whether `answer` (what a box held) is the answer `gold` (what the data set holds). Not symmetric.

    What neither text nor math-verify can read or compare (its exceptions count) is not equal. There is no time limit:
    see the module's docstring.
    """
    as_text = is_equal_as_text(answer, gold)
    return _compare_claims(answer, gold, _compare) if as_text is None else as_text


# ---------------------------------------------------------------------------------------------------- spelling

_CHARACTERS = str.maketrans(
    {
        "\u2212": "-",
        "\u2013": "-",
        "\uff0c": ",",
        "\uff08": "(",
        "\uff09": ")",
        "\uff05": "%",
        "\u00b0": r"^\circ",
        "\u03c0": r"\pi ",
        "\u00d7": r"\times ",
        "\u00a0": " ",
        "\u202f": " ",
    }
)

_WRAPPER = r"\\(?:text(?:normal|rm|bf|it|sc)?|math(?:rm|bf|it|sf)|mbox|operatorname)\s*"

_SPELLINGS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\s+", " "),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\(?:left|right|displaystyle)(?![a-zA-Z])\s*\.?", ""),
        (r"(?<!\\)(?:\\!|\\?\$)", ""),  # 1,\!000, currency and inner math shifts
        (r"(?<!\\)\\[,;: ]|~|\\q?quad(?![a-zA-Z])", " "),  # but \\ ends a row
        (r"\\?%|\s*(?<![a-zA-Z\\])percent(?:age)?(?![a-zA-Z])|" + _WRAPPER + r"\{\s*percent\s*\}", r"\\%"),
        (r"\^\s*\{\s*" + _WRAPPER + r"\{\s*(?:st|nd|rd|th)\s*\}\s*\}", ""),  # 11^{\text{th}}
        (r"(?<=\d)(?:st|nd|rd|th)$", ""),
        (r"(?<=\d)\{,\}(?=\d{3})", ""),  # 1{,}000 is always a thousand
        (r"\s*,?\s*(?:" + _WRAPPER + r"\{\s*,?\s*(?:and|or|OR)\s*,?\s*\}|(?<![\\\w])(?:and|or|OR)(?!\w))\s*", ", "),
        (r"(?<=\w)_(?:\{\s*\(?(\d+)\)?\s*\}|(\d+))", r"_{\1\2}"),  # 32_{(8)}, 32_8
        (r"\s+", " "),
    )
]

_THOUSANDS_OR_BRACKET = re.compile(
    r"(?P<open>\\\{|[(\[])|(?P<close>\\\}|[)\]])|(?<![\d.,^_])\d{1,3}(?:(?:,\d{3})+|(?: \d{3})+)(?![\d,])"
)
_DEGREES = re.compile(r"\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))|\\degrees?(?![a-zA-Z])")
_TRIGONOMETRIC = re.compile(r"(?:sin|cos|tan|cot|sec|csc)(?!\w*\})")
_MIXED_NUMBER = re.compile(r"([+-]?\d+) (\d+)/(\d+)")
_INTEGER = re.compile(r"[+-]?\d+")


@functools.lru_cache(maxsize=4096)
def _read(answer: str) -> _Reading:
    text = _unwrap(answer.translate(_CHARACTERS).strip())
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    text = _unwrap(text.strip().rstrip(".,;: "))
    text, unit = _split_unit(text)
    if not _TRIGONOMETRIC.search(text):  # sin 30 is not sin 30 degrees; a plain angle is its number
        text = _DEGREES.sub("", text)
    if r"\begin" not in text:
        text = _join_thousands(text)
    # A space says something only between two words or numbers: \pi r, "1 1/2". One stays after a comma, without which
    # math-verify takes the pair (100,101) for the number 100101.
    text = re.sub(r"(?<![A-Za-z0-9}]) | (?![A-Za-z0-9{])", "", text.strip())
    text = re.sub(r"(?<=\}) (?=[A-Za-z0-9{\\])|(?<=[A-Za-z0-9]) (?=\{)", "", text)
    text = text.replace(",", ", ")
    mixed = _MIXED_NUMBER.fullmatch(text)
    if mixed:
        text = r"{}\frac{{{}}}{{{}}}".format(*mixed.groups())
    if _INTEGER.fullmatch(text):  # digits only, never int(): it refuses 4300 digits and more
        digits = text.lstrip("+-").lstrip("0") or "0"
        text = "-" + digits if text[0] == "-" and digits != "0" else digits
    return _Reading(text, unit)


def _join_thousands(text: str) -> str:
    """1,000 and 1 000 -> 1000, outside brackets: (100,101) is a pair."""
    depth = 0

    def joined(match: re.Match[str]) -> str:
        nonlocal depth
        depth += (match["open"] is not None) - (match["close"] is not None)
        return match.group() if depth or match["close"] else re.sub("[, ]", "", match.group())

    return _THOUSANDS_OR_BRACKET.sub(joined, text)


def _unwrap(text: str) -> str:
    r"""Without the $...$, \(...\), \[...\], \boxed{...}, \text{...} or {...} around the whole."""
    while True:
        inner = text
        for left, right in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
            if len(inner) > len(left + right) and inner.startswith(left) and inner.endswith(right):
                middle = inner[len(left) : -len(right)]
                if left not in middle and not middle.endswith("\\"):
                    inner = middle.strip()
        opening = re.match(r"(?:\\boxed\s*|" + _WRAPPER + r")?\{", inner)
        if opening and _closes_at_end(inner, opening.end()):
            inner = inner[opening.end() : -1].strip()
        if inner == text:
            return text
        text = inner


def _closes_at_end(text: str, start: int) -> bool:
    depth = 1
    for token in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(token.group(), 0)
        if depth == 0:
            return start + token.end() == len(text)
    return False


# ------------------------------------------------------------------------------------------------------- units

_UNIT_NAMES = """
mm millimeter millimeters millimetre millimetres | cm centimeter centimeters centimetre centimetres
m meter meters metre metres | km kilometer kilometers kilometre kilometres
| in inch inches | ft foot feet | yd yard yards
mi mile miles | acre acres | mL ml milliliter milliliters | L l liter liters litre litres
| gal gallon gallons | mg
g gram grams | kg kilogram kilograms | lb lbs pound pounds | oz ounce ounces | s sec second seconds | min minute minutes
h hr hrs hour hours | day days | week weeks | month months | year years | am a.m AM A.M | pm p.m PM P.M
degree degrees | dollar dollars | cent cents | unit units | mph | MB
"""
_UNITS = {name: names.split()[0] for names in re.split(r"[|\n]", _UNIT_NAMES.strip()) for name in names.split()}
_WORD = "|".join(sorted((re.escape(name) for name in _UNITS), key=len, reverse=True))
_POWER = r"\s*(?:\^\s*\{?\s*[23]\s*\}?)?"
_WRAPPED = rf"{_WRAPPER}\{{[^{{}}\\]*\}}{_POWER}"
# Without a \text around it, one letter is a unit only after a space: 2s and 10t are products.
_BARE = rf"(?:(?:square|sq\.?|cubic|cu\.?) )?(?:{_WORD}){_POWER}(?![a-zA-Z])"
_UNIT = re.compile(
    rf"(?P<head>.*?[\w)}}!%])(?P<gap>\s*)(?P<unit>(?:{_WRAPPED}|{_BARE})"
    rf"(?:\s*(?:/|per)\s*(?:{_WRAPPED}|{_BARE}))?)"
)
_COUNTED = re.compile(r"(?P<head>[\d.]+) [a-z]{4,}")  # 12 apples
_JOINS = re.compile(r"\b(?:and|or)\b", re.IGNORECASE)


def _split_unit(text: str) -> tuple[str, str]:
    counted = _COUNTED.fullmatch(text)
    if counted and text.split()[1] not in _UNITS:
        return counted["head"], ""
    found = _UNIT.fullmatch(text)
    if not found or not re.search(r"\d", found["head"]) or _JOINS.search(found["unit"]):
        return text, ""
    behind_number = re.search(r"[\d})]$|\\pi$", found["head"])
    one_letter = re.match("[A-Za-z](?![A-Za-z])", found["unit"])
    if not found["unit"].startswith("\\") and (not behind_number or (one_letter and not found["gap"])):
        return text, ""
    plain = re.sub(rf"{_WRAPPER}|[{{}}^]", "", found["unit"]).strip()
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9./ -]{0,40}", plain):
        return text, ""
    parts = [_unit_name(part) for part in re.split(r"\s*(?:/|\bper\b)\s*", plain)]
    # An unknown word (12 \text{ apples}) is dropped as well, but it cannot contradict another.
    return found["head"], "/".join(parts) if all(parts) else ""


def _unit_name(words: str) -> str:
    """Canonical name with its power ("square feet" -> "ft2"), or "" if it is not a unit of the table."""
    match = re.fullmatch(
        r"(?:(?P<square>square|sq\.?)|(?P<cubic>cubic|cu\.?))?\s*(?P<name>[A-Za-z.]+?)\s*(?P<power>[23]?)", words
    )
    if not match:
        return ""
    name = match["name"].replace(".", "")
    for spelling in (name, name.lower()):
        if spelling in _UNITS:
            return _UNITS[spelling] + ("2" if match["square"] else "3" if match["cubic"] else match["power"])
    return ""


# -------------------------------------------------------------------------------------------------- comparison

# What may stand in a number; any other letter makes a name (x, f(x), \theta, \text{Area}).
_NUMBER_COMMANDS = re.compile(r"\\(?:frac|sqrt|cdot|times|div|pi|pm)(?![a-zA-Z])")
_WORDS = re.compile(r"[A-Za-z][A-Za-z ]+")
_IN_BASE = re.compile(r"-?[0-9A-Za-z]+_\{\d+\}")
_FROM_FALSE_TO_TRUE = (False, None, True)
_Known = TypeVar("_Known", bound=bool | None)


def _compare_claims(answer: str, gold: str, compare: Callable[[str, str], _Known]) -> _Known | bool:
    """`compare` on what is claimed. None is "not known" (only where `compare` returns None).

    An equation claims each of its sides that is a number: 7=5 is no way to say 5, x = 10/2 = 5 is. For a gold answer
    like 0.56 = 56% either side will do.
    """
    mine, truth = _read(answer), _read(gold)
    if not mine.text or (mine.unit and truth.unit and mine.unit != truth.unit):
        return False
    if mine.text == truth.text:
        return True
    if {mine.unit, truth.unit} & {"am", "pm"}:  # times of day are not ratios: 2:15 pm is not 4:30 pm
        return False
    my_sides, true_sides = _sides(mine.text), _sides(truth.text)
    if len(true_sides) == 1 and (numbers := _numbers(my_sides)):
        return min((compare(number, truth.text) for number in numbers), key=_FROM_FALSE_TO_TRUE.index)
    if len(my_sides) == 1 and (numbers := _numbers(true_sides)):
        return max((compare(mine.text, number) for number in numbers), key=_FROM_FALSE_TO_TRUE.index)
    return compare(mine.text, truth.text)


def _sides(text: str) -> list[str]:
    """The sides of an equation; one side, the text itself, if it is none (several equations are none either)."""
    depth, starts = 0, [0]
    for token in re.finditer(r"\\.|[<>!:]=|[][(){},;=]", text, re.DOTALL):
        if token.group() in "([{":
            depth += 1
        elif token.group() in ")]}":
            depth -= 1
        elif depth == 0 and token.group() in ",;":
            return [text]
        elif depth == 0 and token.group() == "=":
            starts.append(token.end())
    ends = [start - 1 for start in starts[1:]] + [len(text)]
    return [text[start:end] for start, end in zip(starts, ends, strict=True)]


def _numbers(sides: list[str]) -> list[str]:
    """The sides that are numbers, if this is an equation that ends in one; otherwise none."""
    if len(sides) == 1 or "" in sides or _holds_name(sides[-1]):
        return []
    return [_read(side).text for side in sides if not _holds_name(side)]


def _holds_name(text: str) -> bool:
    return re.search(r"[A-Za-z]", _NUMBER_COMMANDS.sub(" ", text)) is not None


def _compare_text(mine: str, truth: str) -> bool | None:
    if mine == truth:
        return True
    if _INTEGER.fullmatch(mine) and _INTEGER.fullmatch(truth):
        return False
    if _IN_BASE.fullmatch(mine) and _IN_BASE.fullmatch(truth):
        return False
    if _is_list_of_one(mine) and not _is_list_of_one(truth):  # [5] is not 5, though some gold answers are written so
        return False
    if _WORDS.fullmatch(mine) and _WORDS.fullmatch(truth) and mine.casefold() == truth.casefold():
        return True
    without = _without_percent(mine, truth)
    return True if without is not None and _compare_text(*without) else None


def _compare(mine: str, truth: str) -> bool:
    as_text = _compare_text(mine, truth)
    if as_text is not None:
        return as_text
    if _math_verify(mine, truth):
        return True
    without = _without_percent(mine, truth)
    return without is not None and _compare(*without)


def _is_list_of_one(text: str) -> bool:
    return text.startswith("[") and text.endswith("]") and "," not in text and text.count("[") == 1


def _without_percent(mine: str, truth: str) -> tuple[str, str] | None:
    r"""The pair without its percent signs where they say nothing: both have one, or one has it after a number from 1
    up (12.5\% for 12.5, when a question asks for a percentage; but 0.5\% is not 0.5)."""
    bare = mine.removesuffix(r"\%"), truth.removesuffix(r"\%")
    signs = (bare[0] != mine) + (bare[1] != truth)
    if signs == 2 or (signs == 1 and all(re.match("-?[1-9]", side) for side in bare)):
        return bare
    return None


def _math_verify(mine: str, truth: str) -> bool:
    from math_verify import verify  # imports sympy: hundreds of milliseconds

    return bool(verify(_parse_gold(truth), _parse(mine), timeout_seconds=None))


def _parse(text: str) -> list[object]:
    from math_verify import parse

    formulas: list[object] = parse(f"${text}$", extraction_config=_latex_only(), parsing_timeout=None)
    return formulas


_parse_gold = functools.lru_cache(maxsize=4096)(_parse)  # the responses of a group share theirs


@functools.lru_cache(maxsize=1)
def _latex_only() -> tuple[object, ...]:
    """math-verify's configuration: the whole text is one formula; no search for numbers in prose, no units."""
    import dataclasses

    from math_verify import LatexExtractionConfig

    config = LatexExtractionConfig(boxed_match_priority=-1)
    spelling = dataclasses.replace(config.normalization_config, units=False, boxed="none")
    return (dataclasses.replace(config, normalization_config=spelling),)
