r"""What an answer is made of: numbers and formulas (leaves) in lists, tuples, intervals, matrices, ratios, relations.
Pure, and quick on any text.

    1, 2    \{2, 1\}    \pm 1                     list      in any order
    (1, 2)    [1, 2)    x \ge 1    1 < x \le 2    tuple     with its brackets; an inequality knows its letter, too
    (-\infty, 1) \cup (2, \infty)    x \ne 1      union     of tuples, in any order
    \begin{pmatrix} 1 \\ 2 \end{pmatrix}          matrix    of rows
    1 : 2 : 3                                     ratio
    x = 5    2x + y = 4                           equation  of its sides
    x + y < 1                                     inequality, of two sides, where it is no tuple
"""

import re
from typing import NamedTuple

from grpo_mcore.reward.math_spelling import INTEGER, read

_MAX_DEPTH = 8  # of brackets that are looked into


class Node(NamedTuple):
    kind: str
    text: str  # all of it, in math_spelling.py's spelling
    parts: tuple["Node", ...] = ()
    mark: str = ""  # of a tuple its brackets, of a matrix its kind, of an inequality its sign
    name: str = ""  # x, where a set of numbers is given as a condition on x
    unit: str = ""


def structure(answer: str, depth: int = 0) -> Node:
    text, unit = read(answer)
    node = _structure(text, depth) if depth <= _MAX_DEPTH else None
    return (node or Node("leaf", text))._replace(unit=unit)


def _structure(text: str, depth: int) -> Node | None:
    for reading in (_matrix, _list, _labels, _conjunction, _relation, _union, _brackets, _ratio, _both_signs):
        node = reading(text, depth + 1)
        if node:
            return node
    if text == r"\mathbb{R}":
        return _interval(text, r"-\infty", r"\infty", "()")
    return None


# ------------------------------------------------------------------------------------------------------ splitting

_TOKEN = re.compile(r"\\(?:[a-zA-Z]+|.)|[][(){},;:=<>|]", re.DOTALL)
_DEEPER = {"(": 1, "[": 1, "{": 1, r"\{": 1, r"\begin": 1, ")": -1, "]": -1, "}": -1, r"\}": -1, r"\end": -1}


def _split(text: str, *separators: str) -> tuple[list[str], list[str]]:
    """The parts between `separators` outside of all brackets, and the separators that were found."""
    depth, start, parts, found = 0, 0, [], []
    for token in _TOKEN.finditer(text):
        mark = token.group()
        depth += _DEEPER.get(mark, 0)
        if depth == 0 and mark in separators:
            parts.append(text[start : token.start()].strip())
            found.append(mark)
            start = token.end()
    return [*parts, text[start:].strip()], found


def _inside(text: str, opening: str, closings: tuple[str, ...]) -> str | None:
    """What is within brackets that hold the whole text."""
    closing = next((c for c in closings if text.endswith(c)), None)
    if not closing or not text.startswith(opening) or len(text) <= len(opening + closing):
        return None
    depth = 0
    for token in _TOKEN.finditer(text):
        depth += _DEEPER.get(token.group(), 0)
        if depth == 0 and token.end() < len(text):
            return None
    return text[len(opening) : -len(closing)] if depth == 0 else None


# -------------------------------------------------------------------------------------------------------- readings

_MATRIX = re.compile(
    r"(?P<open>[(\[|]?)\\begin\{(?P<kind>[pbvBV]?matrix|array|cases|aligned)\}(?:\{[lcr|]*\})?"
    r"(?P<body>(?:(?!\\begin|\\end).)*)\\end\{(?P=kind)\}[)\]|]?",
    re.DOTALL,
)


def _matrix(text: str, depth: int) -> Node | None:
    found = _MATRIX.fullmatch(text)
    if not found:
        return None
    lines = [line for line in re.split(r"\\\\(?:\[[^\]]*\])?", found["body"].replace(r"\hline", "")) if line.strip()]
    rows = [[structure(cell, depth) for cell in _split_cells(line)] for line in lines]
    if found["kind"] in ("cases", "aligned"):
        if all(len(row) == 1 for row in rows):
            return _flat_list(text, [row[0] for row in rows])
        kind = "cases"
    else:
        bars = {"v": "|", "V": "||"}.get(found["kind"][0], found["open"] if found["open"] == "|" else "")
        kind = bars or "matrix"  # a determinant is no matrix, round and square brackets are the same
    parts = tuple(Node("tuple", line, tuple(row)) for line, row in zip(lines, rows, strict=True))
    return Node("matrix", text, parts, mark=kind)


def _split_cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)&", line)]


def _list(text: str, depth: int) -> Node | None:
    parts, found = _split(text, ",", ";")
    return _flat_list(text, [structure(part, depth) for part in parts]) if found and all(parts) else None


def _labels(text: str, depth: int) -> Node | None:
    """(1)(2)(4), which names statements and is no product."""
    if not re.fullmatch(r"(?:\([0-9A-Za-z]\) ?){2,}", text):
        return None
    return Node("list", text, tuple(structure(label, depth) for label in re.findall(r"\w", text)))


def _flat_list(text: str, nodes: list[Node]) -> Node:
    flat = [part for node in nodes for part in (node.parts if node.kind == "list" and not node.mark else (node,))]
    is_union = all(node.name and node.kind == "tuple" for node in flat) or (
        all(node.kind == "tuple" and len(node.parts) == 2 for node in flat) and r"\infty" in text
    )
    if is_union:
        names = {node.name for node in flat}
        return Node("union", text, tuple(flat), name=names.pop() if len(names) == 1 else "")
    return Node("list", text, tuple(flat))


def _conjunction(text: str, depth: int) -> Node | None:
    r"""x > 1 \land x < 3, which is (1, 3) where the two are a lower and an upper bound."""
    parts, found = _split(text, r"\land")
    if not found or not all(parts):
        return None
    nodes = [structure(part, depth) for part in parts]
    if len(nodes) == 2 and all(node.kind == "tuple" and node.name == nodes[0].name != "" for node in nodes):
        lower, upper = sorted(nodes, key=lambda node: node.parts[0].text == r"-\infty")
        if lower.parts[1].text == r"\infty" and upper.parts[0].text == r"-\infty":
            parts_of = (lower.parts[0], upper.parts[1])
            return Node("tuple", text, parts_of, mark=lower.mark[0] + upper.mark[1], name=lower.name)
    return Node("list", text, tuple(nodes), mark=r"\land")


def _union(text: str, depth: int) -> Node | None:
    parts, found = _split(text, r"\cup")
    if not found or not all(parts):
        return None
    nodes = [structure(part, depth) for part in parts]
    if all(node.kind == "list" and not node.name for node in nodes):  # \{1\} \cup \{2\}
        return Node("list", text, tuple(part for node in nodes for part in node.parts))
    return Node("union", text, tuple(nodes))


def _brackets(text: str, depth: int) -> Node | None:
    for opening, closings in (("(", (")", "]")), ("[", (")", "]")), (r"\{", (r"\}",))):
        inner = _inside(text, opening, closings)
        if inner is None:
            continue
        if opening == r"\{":
            condition = re.fullmatch(r"([^|:]*)(?:\||:)(.+)", inner)  # \{x | x > 5\}
            if condition:
                name, _, of = condition[1].partition(r"\in")
                node = structure(condition[2], depth)
                is_real = of.strip() in ("", r"\mathbb{R}")
                return node if is_real and node.name and node.name == name.strip() else None
            parts, _ = _split(inner, ",", ";")
            return Node("list", text, tuple(structure(part, depth) for part in parts)) if all(parts) else None
        parts, found = _split(inner, ",", ";")
        if not all(parts):
            return None
        if not found and opening + text[-1] == "()":
            return structure(inner, depth)
        return Node("tuple", text, tuple(structure(part, depth) for part in parts), mark=opening + text[-1])
    return None


def _ratio(text: str, depth: int) -> Node | None:
    parts, found = _split(text, ":")
    if not found or not all(parts):
        return None
    return Node("ratio", text, tuple(structure(part, depth) for part in parts))


def _both_signs(text: str, depth: int) -> Node | None:
    signs = re.findall(r"\\(?:pm|mp)(?![a-zA-Z])", text)
    if signs not in ([r"\pm"], [r"\pm", r"\mp"]):
        return None
    upper, lower = (
        re.sub(r"\\mp(?![a-zA-Z])", mp, re.sub(r"\\pm(?![a-zA-Z])", pm, text)) for pm, mp in (("+", "-"), ("-", "+"))
    )
    return Node("list", text, (structure(upper.removeprefix("+"), depth), structure(lower, depth)))


# ------------------------------------------------------------------------------------------------------- relations

_OPERATORS = ("=", "<", ">", r"\le", r"\ge", r"\ne", r"\in")
_TURNED = {">": "<", r"\ge": r"\le"}
_NAME = re.compile(
    r"(?:\\(?:angle|triangle|overline|vec|hat|bar|widehat|mathcal|max|min|sin|cos|tan|cot|log|ln|gcd|lcm|deg|arg"
    r"|[aA]lpha|[bB]eta|[gG]amma|[dD]elta|epsilon|varepsilon|zeta|eta|theta|Theta|kappa|[lL]ambda|mu|nu|rho|[sS]igma|tau"
    r"|[pP]hi|varphi|chi|[pP]si|[oO]mega)(?![a-zA-Z])|[A-Za-z]|'|\{[^{}]*\}|_\{[^{}]*\}|_\w|\^\{\\prime\}|\^\{-1\}| )+"
    r"(?:\([^()=<>]*\))?|\|[A-Za-z]+\||[A-Za-z]+\[[^][]*\]"
)


def is_name(text: str) -> bool:
    r"""x, x_1, f(x), AB, \angle ABC, \sin A, Area, |AB|: what can have a value and is not put together from others.

    >>> [is_name(t) for t in ("x_{1}", "f(x)", r"\sin A", "2x", "x+y", "5", "e", r"\pi")]
    [True, True, True, False, False, False, False, False]
    """
    return text not in ("e", "i", "") and _NAME.fullmatch(text) is not None and re.search("[A-Za-z]", text) is not None


def _relation(text: str, depth: int) -> Node | None:
    sides, operators = _split(text, *_OPERATORS)
    if not operators or not all(sides):
        return None
    if operators == [r"\in"] and is_name(sides[0]):
        return structure(sides[1], depth)._replace(name=sides[0])
    if set(operators) == {"="}:
        return _equation(text, [structure(side, depth) for side in sides])
    if operators == [r"\ne"] and is_name(sides[0]):
        low, high = (_interval(text, *ends, "()") for ends in ((r"-\infty", sides[1]), (sides[1], r"\infty")))
        return Node("union", text, (low, high), name=sides[0])
    if set(operators) <= set(_TURNED):
        sides, operators = sides[::-1], [_TURNED[operator] for operator in operators[::-1]]
    return _inequality(text, sides, operators, depth) if set(operators) <= set(_TURNED.values()) else None


def _equation(text: str, sides: list[Node]) -> Node:
    first, last = sides[0], sides[-1]
    if len(sides) == 2 and last.kind == "list":  # x = \pm 5
        return Node("list", text, tuple(Node("equation", text, (first, part)) for part in last.parts))
    return Node("equation", text, tuple(sides))


def _inequality(text: str, sides: list[str], operators: list[str], depth: int) -> Node | None:
    """Of sides that do not fall."""
    brackets = [("(", ")") if operator == "<" else ("[", "]") for operator in operators]
    if len(sides) == 2:
        low, high = sides
        for name in sorted(filter(is_name, sides), reverse=True):  # x > a is a condition on x
            if name == low and name not in high:
                return _interval(text, r"-\infty", high, "(" + brackets[0][1])._replace(name=name)
            if name == high and name not in low:
                return _interval(text, low, r"\infty", brackets[0][0] + ")")._replace(name=name)
        parts = tuple(structure(side, depth) for side in sides)
        return Node("inequality", text, parts, mark=operators[0])
    if len(sides) == 3 and is_name(sides[1]) and not any(sides[1] in side for side in (sides[0], sides[2])):
        return _interval(text, sides[0], sides[2], brackets[0][0] + brackets[1][1])._replace(name=sides[1])
    return None


def _interval(text: str, low: str, high: str, mark: str) -> Node:
    return Node("tuple", text, (structure(low, _MAX_DEPTH), structure(high, _MAX_DEPTH)), mark=mark)


def holds_letters(text: str) -> bool:
    """Whether there is a letter that makes no number: any but those of commands for numbers, e and i."""
    bare = re.sub(r"\\(?:frac|sqrt|cdot|times|div|pi|pm|ln|log|sin|cos|tan|binom)(?![a-zA-Z])", " ", text)
    return re.search(r"[A-Za-df-hj-z]", bare) is not None


def is_integer(text: str) -> bool:
    return INTEGER.fullmatch(text) is not None
