r"""Mathematical answers in one spelling: LaTeX, Unicode and plain text that print the same become the same text, and a
unit is split off.

math-verify's own list of units takes single letters for units, so that 2 passes for 2s and 3m for 3g; here a unit is a
word of the table, or words in a \text.
"""

import functools
import re
from typing import NamedTuple


class Reading(NamedTuple):
    text: str  # LaTeX in one spelling, without its unit
    unit: str  # canonical, e.g. "cm2", "km/h"; "" where there is none


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
        "\u00b7": r"\cdot ",
        "\u00f7": r"\div ",
        "\u221a": r"\sqrt ",
        "\u221e": r"\infty ",
        "\u2264": r"\le ",
        "\u2265": r"\ge ",
        "\u2260": r"\ne ",
        "\u00b1": r"\pm ",
        "\u222a": r"\cup ",
        "\u2208": r"\in ",
        "\u2205": r"\emptyset ",
        "\u211d": r"\mathbb{R}",
        "\u03b8": r"\theta ",
        "\u00b2": "^2",
        "\u00b3": "^3",
        "\u00bd": r"\frac{1}{2}",
        "\u00bc": r"\frac{1}{4}",
        "\u00be": r"\frac{3}{4}",
        "\u00a0": " ",
        "\u202f": " ",
        "\u2009": " ",
    }
)

_WRAPPER = r"\\(?:text(?:normal|rm|bf|it|sc)?|math(?:rm|bf|it|sf)|mbox|operatorname)\s*"
_FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|pi|infty|infinity"
_SCALES = {"dozen": 12, "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALED = re.compile(rf"(.*\d) ?({'|'.join(_SCALES)})s?")
_INEQUALITY = re.compile(r"[<>]|\\(?:[lg]eq?|[lg]eqslant|neq?|lt|gt)(?![a-zA-Z])")

_SPELLINGS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\s+", " "),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits)(?![a-zA-Z])\s*\.?", ""),
        (r"(?<=\d)\s*(?:,\s*\\!|\{\s*,\s*\})\s*(?=\d{3})", ""),  # 1,\! 000 and 1{,}000 are always a thousand
        (r"(?<!\\)(?:\\!\s*|\\?\$)", ""),  # currency and inner math shifts
        (r"(?<!\\)\\[,;: ]|~|\\q?quad(?![a-zA-Z])", " "),  # but \\ ends a row
        (r"\\?%|\s*(?<![a-zA-Z\\])percent(?:age)?(?![a-zA-Z])|" + _WRAPPER + r"\{\s*percent\s*\}", r"\\%"),
        (r"\^\s*\{\s*" + _WRAPPER + r"\{\s*(?:st|nd|rd|th)\s*\}\s*\}", ""),  # 11^{\text{th}}
        (r"(?<=\d)(?:st|nd|rd|th)$", ""),
        (_WRAPPER + r"\{\s*(,?\s*(?:and|or|AND|OR)\s*,?)\s*\}", r" \1 "),
        (r"\\(?:land|wedge)(?![a-zA-Z])", " and "),
        (r"\\(?:lor|vee)(?![a-zA-Z])", " or "),
        (r"\\(le|ge|ne)(?:q|qslant)?(?![a-zA-Z])", r"\\\1 "),
        (r"\\lt(?![a-zA-Z])", "<"),
        (r"\\gt(?![a-zA-Z])", ">"),
        (r"\\equiv(?![a-zA-Z])(?!.*mod)", "="),
        ("<=", r"\\le "),
        (">=", r"\\ge "),
        ("!=", r"\\ne "),
        (r"\\(?:varnothing|O)(?![a-zA-Z])|\\\{\s*\\\}", r"\\emptyset "),
        (r"\\(?:langle|lparen)(?![a-zA-Z])", "("),
        (r"\\(?:rangle|rparen)(?![a-zA-Z])", ")"),
        (r"\\lbrace(?![a-zA-Z])", r"\\{"),
        (r"\\rbrace(?![a-zA-Z])", r"\\}"),
        (r"\\bigcup(?![a-zA-Z])", r"\\cup "),
        (r"\\(?:lvert|rvert|vert|mid)(?![a-zA-Z])", "|"),
        (_WRAPPER + rf"\{{\s*({'|'.join(_SCALES)})s?\s*\}}", r" \1"),  # 2 \text{ million}
        (_WRAPPER + rf"\{{\s*({'|'.join(_SCALES)})s?(?![a-zA-Z])", r" \1 \\text{"),
        (_WRAPPER + r"\{\s*(" + _FUNCTIONS + r")\s*\}", r"\\\1 "),
        (r"(?<![A-Za-z\\])(" + _FUNCTIONS + r")(?![A-Za-z])", r"\\\1 "),  # 2pi, sqrt(3)
        (r"\\infinity ", r"\\infty "),
        (r"\+\s*\\infty(?![a-zA-Z])", r"\\infty"),
        (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\\(cap|setminus|cup|in)(?![a-zA-Z])", r"\\\1 "),
        (r"(?<=\w)_(?:\{\s*\(?(\d+)\)?\s*\}|(\d+))", r"_{\1\2}"),  # 32_{(8)}, 32_8
        (r"\^\s*([+-](?:\d+|[a-zA-Z]))(?!\w)", r"^{\1}"),  # 10^-2
        (r"\s+", " "),
    )
]
_STOP = re.compile(r"(?<![.,;:\s])\s*(?:\.(?!\s*\.)|[,;:])[,;: ]*$")  # but not 2, 3, 5, ...
_JOIN = re.compile(r"\s*,?\s*(?<![\\\w])(and|or|AND|OR)(?!\w)\s*,?\s*")
_MONEY = re.compile(r"[+-]?\\?\$ ?[^$]*|[+-]?\s*(?P<coin>[\u00a3\u20ac]|\\pounds|\\euro)")
_COINS = {"\u00a3": "gbp", r"\pounds": "gbp", "\u20ac": "euro", r"\euro": "euro"}

_THOUSANDS_OR_BRACKET = re.compile(
    r"(?P<open>\\\{|[(\[])|(?P<close>\\\}|[)\]])|(?<![\d.,^_])\d{1,3}(?:(?:,\d{3})+|(?: \d{3})+)(?![\d,])"
)
_DEGREES = re.compile(r"\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))|\\degrees?(?![a-zA-Z])")
_TEMPERATURE = re.compile(rf"(?:{_DEGREES.pattern})\s*(?:{_WRAPPER}\{{\s*)?(C|F|Celsius|Fahrenheit)\s*\}}?$")
_TRIGONOMETRIC = re.compile(r"(?:sin|cos|tan|cot|sec|csc)(?!\w*\})")
_BASE = re.compile(r"^-?[0-9A-Z]*[0-9]_\{\d+\}$")
_MIXED_NUMBER = re.compile(r"([+-]?\d+) (\d+)/(\d+)")
INTEGER = re.compile(r"[+-]?\d+")


@functools.lru_cache(maxsize=4096)
def read(answer: str) -> Reading:
    text = answer.strip()
    money = _MONEY.fullmatch(text) or _MONEY.match(text)
    unit = ""
    if money and (money["coin"] or money.end() == len(text)):
        unit = _COINS[money["coin"]] if money["coin"] else "dollar"
        text = text.replace(money["coin"], "") if money["coin"] else text
    text = unwrap(text.translate(_CHARACTERS).strip())
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    # Of inequalities "and" is the intersection and "or" the union; of anything else both make a list.
    compares = _INEQUALITY.search(text) is not None
    text = _JOIN.sub(lambda m: r" \land " if compares and m[1].lower() == "and" else ", ", text)
    text = unwrap(_STOP.sub("", text.strip()))
    temperature = _TEMPERATURE.search(text)
    if temperature:
        text, unit = text[: temperature.start()], "degree" + temperature[1][0]
    text, found = _split_unit(text)
    unit = unit or found
    scaled = _SCALED.fullmatch(text)
    if scaled:
        text = rf"{scaled[1].replace(',', '')}\cdot {_SCALES[scaled[2]]}"
    text = _without_wrappers(text)
    if not _TRIGONOMETRIC.search(text):  # sin 30 is not sin 30 degrees; a plain angle is its number
        text, degrees = _DEGREES.subn("", text)
        unit = unit or ("degree" if degrees else "")
    if r"\begin" not in text:
        text = _join_thousands(text)
    # A space says something only between two words or numbers: \pi r, "1 1/2". One stays after a comma, so that a list
    # of numbers never looks like one with thousands.
    text = re.sub(r"(?<![A-Za-z0-9}]) | (?![A-Za-z0-9{])", "", re.sub(" +", " ", text.strip()))
    text = re.sub(r"(?<=\}) (?=[A-Za-z0-9{\\])|(?<=[A-Za-z0-9]) (?=\{)|(?<=\d) (?=[a-zA-Z](?![a-zA-Z]))", "", text)
    text = text.replace(",", ", ")
    mixed = _MIXED_NUMBER.fullmatch(text)
    if mixed:
        text = r"{}\frac{{{}}}{{{}}}".format(*mixed.groups())
    if INTEGER.fullmatch(text):  # digits only, never int(): it refuses 4300 digits and more
        digits = text.lstrip("+-").lstrip("0") or "0"
        text = "-" + digits if text[0] == "-" and digits != "0" else digits
    return Reading(text, unit or ("percent" if text.endswith(r"\%") else "base" if _BASE.search(text) else ""))


def _join_thousands(text: str) -> str:
    """1,000 and 1 000 -> 1000, outside brackets: (100,101) is a pair."""
    depth = 0

    def joined(match: re.Match[str]) -> str:
        nonlocal depth
        depth += (match["open"] is not None) - (match["close"] is not None)
        return match.group() if depth or match["close"] else re.sub("[, ]", "", match.group())

    return _THOUSANDS_OR_BRACKET.sub(joined, text)


def _without_wrappers(text: str) -> str:
    r"""\mathrm{e} -> e, x \text{ is odd} -> x is odd."""

    def inner(match: re.Match[str]) -> str:
        content = match[1].strip()
        return content if len(content) == 1 and not text[: match.start()][-1:].isalpha() else f" {content} "

    return re.sub(_WRAPPER + r"\{([^{}]*)\}", inner, text)


def unwrap(text: str) -> str:
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
degree degrees | rad radian radians | dollar dollars | cent cents | unit units | mph | MB
"""
_UNITS = {name: names.split()[0] for names in re.split(r"[|\n]", _UNIT_NAMES.strip()) for name in names.split()}
_CHANGING = re.compile(  # words that change the number before them
    r"\b(?:and|or|to|mod|modulo|squared|cubed|factorial|less|more|times|half|halves|thirds?|quarters?|fourths?|fifths?"
    r"|tenths?|hundredths?|thousandths?|dozens?|hundreds?|thousands?|millions?|billions?|trillions?|plus|minus|over)\b",
    re.IGNORECASE,
)
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


def _split_unit(text: str) -> tuple[str, str]:
    counted = _COUNTED.fullmatch(text)
    if counted and text.split()[1] not in _UNITS:
        return (text, "") if _CHANGING.search(text) else (counted["head"], "")
    found = _UNIT.fullmatch(text)
    if not found or not re.search(r"\d", found["head"]):
        return text, ""
    behind_number = re.search(r"[\d})]$|\\pi$", found["head"])
    one_letter = re.match("[A-Za-z](?![A-Za-z])", found["unit"])
    if not found["unit"].startswith("\\") and (not behind_number or (one_letter and not found["gap"])):
        return text, ""
    plain = re.sub(rf"{_WRAPPER}|[{{}}^]", "", found["unit"]).strip()
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9./ -]{0,40}", plain):
        return text, ""
    parts = [_unit_name(part) for part in re.split(r"\s*(?:/|\bper\b)\s*", plain)]
    # An unknown word (12 \text{ apples}) is dropped as well, but it cannot contradict another. An unknown letter
    # (2\mathrm{e}) is a symbol, and so is not dropped.
    if not all(parts) and (len(plain) == 1 or _CHANGING.search(plain)):
        return text, ""
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
