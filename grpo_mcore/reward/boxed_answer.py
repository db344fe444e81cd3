r"""The second verifier: by the rules of the original DeepScaleR run's grader (those of PRM800K's and MATH's), written
anew.

The last \boxed{} after the first </think>, of nested ones the inner; then, in this order, until one decides:

    1. equal normalised texts are equal
    2. (a, b) and [a, b]: as many elements in the same brackets, each compared by 3 to 5; those around a single one do
    not count
    3. two fractions of integers are compared as written: 2/4 is not 1/2
    4. an integer equals nothing that is written otherwise: \sqrt{16} is not 4
    5. sympy: the simplified difference is 0; only for what holds at most two letters and no power that could explode,
    else not equal

So it is stricter than math_answer.py (3, 4, sets, intervals, equations), and more lenient with percent signs and units,
which it drops. Departures from the original: one normalisation where it tries two; LaTeX goes to sympy through a
parser, never through `eval`, so that functions (\sin, \log) are compared as text; -1 1/2 is -3/2; digits are compared
and not their floating-point values.

Like math_answer.py, `compare` belongs into a process that can be killed, and `compare_text` is safe anywhere.
"""

import functools
import re

from grpo_mcore.reward.math_answer import MAX_BOX_CHARS

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_UNITS = "degree|cm|centimeter|meter|mile|second|minute|hour|day|week|month|year|foot|feet|inch|yard"


def extract_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} that is opened after the first </think>, or None: if that one is not closed,
    is blank or holds more than MAX_BOX_CHARS characters. Time is linear in the length of the text.

    >>> extract_boxed(r"<think>\boxed{1}</think> \boxed{\boxed{5}+1}")
    '5'
    """
    _, found, after = text.partition("</think>")
    body = after if found else text
    openings = list(_BOX.finditer(body))
    if not openings:
        return None
    start, depth = openings[-1].end(), 1
    for brace in re.finditer("[{}]", body[start : start + MAX_BOX_CHARS + 1]):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return body[start : start + brace.start()].strip() or None
    return None


# ---------------------------------------------------------------------------------------------------- spelling

_SPELLINGS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\n|\\!", ""),
        (r"\\\\", r"\\"),
        (r"\\[,;: ]|~|\\q?quad(?![a-zA-Z])", " "),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\(?:left|right|displaystyle)(?![a-zA-Z])", ""),
        (r"\^\s*\{?\s*\\circ\s*\}?|°", ""),
        (r"\\?[$%]", ""),
        (r"(?<=\S)\s*\\text\s*\{\s+[^{}]*\}\s*(?:\^\s*\{?\d\}?)?", ""),  # \text{ with a space behind something: a unit
        (r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}", r"\1"),
        (r"(?<![a-zA-Z\\])(?:or|and)(?![a-zA-Z])", ","),
        (rf"(?<=[\d\s)}}])\s*(?:{_UNITS})(?:es|s)?(?:\s*\^\s*\{{?\d\}}?)?$", ""),
        (r"\{,\}", ","),
        (r"−|–", "-"),
        (r"π", r"\\pi "),
        (r"(?<![\d}])\.(?=\d)", "0."),
        (r"\\(?:cdot|times)(?![a-zA-Z])|×|·", "*"),
        (r"\\frac\s*(?!\{)(\d|[a-zA-Z])", r"\\frac{\1}"),  # \frac12, \frac1{72}
        (r"(\\frac\s*\{[^{}]*\})\s*(\d|[a-zA-Z])", r"\1{\2}"),
        (r"\\sqrt\s*(\d|[a-zA-Z])", r"\\sqrt{\1}"),
        (r"\^\s*\{\s*(\d|[a-zA-Z])\s*\}", r"^\1"),
        (r"\\frac\s*\{\s*-\s*([^{}]*)\}", r"-\\frac{\1}"),
        (r"^([+-]?)\s*(\d+)\s*\\frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}$", r"\1(\2+\\frac{\3}{\4})"),  # mixed numbers
        (r"^([+-]?)\s*(\d+) +(\d+)\s*/\s*(\d+)$", r"\1(\2+\\frac{\3}{\4})"),
        (r"^([+-]?)(\d+)\s*/\s*(\d+)$", r"\1\\frac{\2}{\3}"),
        (r"(?<![\\a-zA-Z])sqrt\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<![\\a-zA-Z])pi(?![a-zA-Z])", r"\\pi"),
    )
]
_COMMAND = re.compile(r"(\\[a-zA-Z]+)\s+(?=[a-zA-Z])|(\\[a-zA-Z]+)|\s+|[A-Z]+")
_INTEGER = re.compile(r"([+-]?)0*(\d+)(?:\.0*)?")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")


@functools.lru_cache(maxsize=4096)
def normalise(answer: str) -> str:
    r"""One spelling, in lower case, without spaces, units, percent and dollar signs.

    >>> [normalise(a) for a in (r"\dfrac12", "x = 5", "10,000", "1 1/2", "12 cm", r"50\%")]
    ['\\frac{1}{2}', '5', '10000', '(1+\\frac{1}{2})', '12', '50']
    """
    text = answer.strip()
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text.strip())
    # \pi r keeps its space and \Gamma its capital.
    text = _COMMAND.sub(lambda m: m[1] + " " if m[1] else m[2] or m[0].strip().lower(), text)
    if text.startswith("{") and text.endswith("}") and "{" not in text[1:-1]:
        text = text[1:-1]
    sides = text.split("=")
    if len(sides) == 2 and 0 < len(sides[0]) <= 2:  # x = 5
        text = sides[1]
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    if text == "0.5":
        text = r"\frac{1}{2}"
    if integer := _INTEGER.fullmatch(text):
        sign, digits = integer.groups()
        text = "-" + digits if sign == "-" and digits != "0" else digits
    return text


# -------------------------------------------------------------------------------------------------- comparison

_FRACTION = re.compile(r"-?\\frac\{\d+\}\{\d+\}")
_DIGITS = re.compile(r"-?\d+")
_COMMANDS = re.compile(r"\\(?:frac|sqrt|pi)(?![a-z])")
_EXPLOSIVE = re.compile(r"\^[{(]|\^[0-9]+\^|\^[0-9]{2,}")
_READABLE = re.compile(r"[0-9a-z +\-*/^(){}.]+")


def compare_text(answer: str, gold: str) -> tuple[bool | None, str]:
    """(equal, the rule that decided); None where it takes sympy. Microseconds, on any input of at most some
    kilobytes."""
    pairs, rule = _pairs(answer, gold)
    if not pairs:
        return rule == "text", rule
    decided = [_element(*pair) for pair in pairs]
    for equal, rule in decided:
        if equal is False:
            return False, rule
    return (None, "sympy") if any(equal is None for equal, _ in decided) else (True, "text")


def compare(answer: str, gold: str) -> tuple[bool, str]:
    """(equal, the rule that decided). There is no time limit: see the module's docstring."""
    equal, rule = compare_text(answer, gold)
    if equal is not None:
        return equal, rule
    pairs, _ = _pairs(answer, gold)
    return all(_element(*pair)[0] or _sympy(*pair) for pair in pairs), "sympy"


def _pairs(answer: str, gold: str) -> tuple[list[tuple[str, str]], str]:
    """The elements to compare, one by one; none where a rule has decided: "text" for equal, any other for not."""
    # Some data sets' answers are whole sentences with a box.
    mine, truth = normalise(answer), normalise(extract_boxed(gold) or gold)
    if mine and mine == truth:
        return [], "text"
    if not mine:
        return [], "text: blank"
    my_elements, true_elements = _elements(mine), _elements(truth)
    same_brackets = len(true_elements) == 1 or (mine[0], mine[-1]) == (truth[0], truth[-1])
    if len(my_elements) != len(true_elements) or not same_brackets:
        return [], "text: other brackets or another number of elements"
    return list(zip(my_elements, true_elements, strict=True)), ""


def _elements(text: str) -> list[str]:
    if len(text) > 2 and text[0] in "([" and text[-1] in ")]" and not re.search(r"[()\[\]]", text[1:-1]):
        return [normalise(element) for element in text[1:-1].split(",")]
    return [text]


def _element(mine: str, truth: str) -> tuple[bool | None, str]:
    if mine == truth:
        return True, "text"
    if _FRACTION.fullmatch(mine) and _FRACTION.fullmatch(truth):
        return False, "text: fractions are compared as written"
    if _DIGITS.fullmatch(mine) or _DIGITS.fullmatch(truth):
        return False, "text: an integer equals only itself"
    for text in (mine, truth):
        bare = _COMMANDS.sub("", text)
        if not _READABLE.fullmatch(bare or "0") or _EXPLOSIVE.search(text):
            return False, "text: not for sympy"
    if len(set(re.findall("[a-z]", _COMMANDS.sub("", mine + truth)))) > 2:
        return False, "text: more than two letters"
    return None, "sympy"


def _sympy(mine: str, truth: str) -> bool:
    """Whether the difference simplifies to 0. What cannot be read is not equal."""
    import sympy
    from latex2sympy2_extended import latex2sympy

    try:
        return bool(sympy.simplify(latex2sympy(f"({truth})-({mine})")) == 0)
    except Exception:  # the parser raises Exception itself
        return False
