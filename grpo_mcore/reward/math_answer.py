r"""Mathematical answers: cut them out of a response, and compare them.

    math_spelling.py     one spelling; the unit apart
    math_structure.py    lists, tuples, intervals, matrices, relations, and the leaves in them
    math_number.py       two leaves that are numbers: exactly
    math_formula.py      two leaves that are formulas: read by math-verify, compared by algebra

A reward is easy to game, so what decides never reads a response: it sees the content of a box, cut out by
`extract_boxed`. Where two answers could be meant to be equal and need not be, they are not.

Comparing formulas can take for ever (9^{9^{9^9}}): call `is_equal` in a process that can be killed (grading_process.py
does). `is_equal_as_text` is the part that is safe anywhere.
"""

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable

from grpo_mcore.reward import math_formula, math_number
from grpo_mcore.reward.math_spelling import read
from grpo_mcore.reward.math_structure import Node, holds_letters, is_integer, is_name, structure

MAX_BOX_CHARS = 512
"""Longer boxes are refused: no answer is that long, and parsing time grows faster than length."""

# An escaped brace (\{) prints a brace and does not group; "\\boxed{" is what a model writes that copied an escaped
# prompt.
_TOKEN = re.compile(r"\\\\?boxed\s*\{|\\[^a-zA-Z]|[{}]", re.DOTALL)
_JOIN_CHARS = 40
_JOIN = re.compile(
    r"(?=.*(?:[,;&]|and|or))(?:\s|\$|[,;&~]|\\[()\[\],;: ]|\\q?quad|\\(?:text|mbox|mathrm)\s*\{[\s,]*(?:and|or)\s*\}"
    r"|(?<![a-z])(?:and|or)(?![a-z]))+",
    re.DOTALL,
)


def extract_boxed(text: str) -> str | None:
    r"""The content of the last balanced \boxed{...} after the first </think>, or None.

    Without a </think> the whole text is read. "Last" is the box that closes last, so of nested boxes it is the outer
    one. Boxes with nothing but a comma, "and" or "or" between them are one answer: the list of what they hold. None
    when there is no such box, when it is blank, or when it holds more than MAX_BOX_CHARS characters (an earlier,
    shorter box does not stand in). Time is linear in the length of the text.

    >>> extract_boxed(r"<think>\boxed{1}</think> It is \boxed{\frac{3}{4}}, not \boxed{2")
    '\\frac{3}{4}'
    >>> extract_boxed(r"$x = 2$. So it is $\boxed{2}$ or $\boxed{-2}$.")
    '2, -2'
    """
    _, found, after = text.partition("</think>")
    body = after if found else text
    if "boxed" not in body:
        return None
    opened: list[re.Match[str] | None] = []  # one entry for each open brace; None if it opens no box
    boxes: list[tuple[int, slice]] = []  # where the box begins, and its content: those that are one answer
    for token in _TOKEN.finditer(body):
        mark = token.group()
        if mark.endswith("{") and mark != r"\{":
            opened.append(token if len(mark) > 1 else None)
        elif mark == "}" and opened:
            opening = opened.pop()
            if opening is None:
                continue
            while boxes and boxes[-1][0] > opening.start():
                boxes.pop()
            if boxes and not _joins(body, boxes[-1][1].stop + 1, opening.start()):
                boxes.clear()
            boxes.append((opening.start(), slice(opening.end(), token.start())))
    if sum(content.stop - content.start for _, content in boxes) > MAX_BOX_CHARS:
        return None
    contents = dict.fromkeys(body[content].strip() for _, content in boxes)
    answer = ", ".join(content for content in contents if content)
    return answer if 0 < len(answer) <= MAX_BOX_CHARS else None


def _joins(body: str, start: int, stop: int) -> bool:
    return stop - start <= _JOIN_CHARS and _JOIN.fullmatch(body, start, stop) is not None


def normalise(answer: str) -> str:
    r"""One spelling for answers that mean the same, still LaTeX. The unit is dropped.

    >>> [normalise(a) for a in ("$025$", r"1{,}000 \text{ cm}^2.", r"\dfrac {7}{9}", r"90^\circ", "1 1/2", "12431_7")]
    ['25', '1000', '\\frac{7}{9}', '90', '1\\frac{1}{2}', '12431_{7}']
    """
    return read(answer).text


def is_equal_as_text(answer: str, gold: str) -> bool | None:
    """`is_equal` where no algebra is needed, None where it is. Milliseconds, on any input.

    Decides: equal spellings, two numbers (math_number.py), words, units that contradict each other, and another number
    of elements.
    """
    return _decide(answer, gold, _compare_text)


def is_equal(answer: str, gold: str) -> bool:
    """Whether `answer` (what a box held) is the answer `gold` (what the data set holds). Not quite symmetric: a gold
    answer may be a text with a box, and need not write a base or be a list of one.

    What can neither be read nor compared is not equal. There is no time limit: see the module's docstring.
    """
    return _decide(answer, gold, _compare_formulas) is True


def _decide(answer: str, gold: str, leaf: "_Leaf") -> bool | None:
    if read(answer) == read(gold) and read(answer).text:
        return True
    return _compare(structure(answer), _gold(gold), leaf)


@functools.lru_cache(maxsize=1024)  # the responses of a group share theirs
def _gold(gold: str) -> Node:
    return structure((extract_boxed(gold) if "boxed" in gold else None) or gold)


# -------------------------------------------------------------------------------------------- of what has parts

_Leaf = Callable[[str, str, str], bool | None]
"""(mine, truth, how) -> whether the first is the second ("="), a multiple of it ("~") or a positive one ("+"); None:
not known, which only algebra can end."""
_MAX_UNORDERED = 32  # elements that are no equal texts


def _all(known: Iterable[bool | None]) -> bool | None:
    answer: bool | None = True
    for one in known:
        if one is False:
            return False
        answer = answer and one
    return answer


def _any(known: Iterable[bool | None]) -> bool | None:
    decided = _all(None if one is None else not one for one in known)
    return None if decided is None else not decided


def _compare(mine: Node, truth: Node, leaf: _Leaf) -> bool | None:
    if not mine.text or _contradict(mine.unit, truth.unit):
        return False
    if mine.text == truth.text and mine.kind == truth.kind != "equation":
        return True
    if {mine.unit, truth.unit} & {"am", "pm"}:  # times of day are not ratios: 2:15 pm is not 4:30 pm
        return mine.text == truth.text
    mine, truth = _only_element(mine), _only_element(truth)
    if truth.mark == "[]" and len(truth.parts) == 1 and mine.mark != "[]":
        truth = truth.parts[0]  # some gold answers are written so; but [5] is no way to say 5
    kinds = {mine.kind, truth.kind}
    if "equation" in kinds:
        return _compare_equations(mine, truth, leaf)
    if "ratio" in kinds:
        return _compare_ratios(mine, truth, leaf)
    if kinds == {"leaf"} or kinds == {"leaf", "matrix"}:
        return leaf(mine.text, truth.text, "=")
    if truth.kind == "list" != mine.kind and len({part.text for part in truth.parts}) == len(truth.parts):
        return _all(_compare(mine, part, leaf) for part in truth.parts)  # 0.09 or 9/100, one number written twice
    if len(kinds) > 1 or len(mine.parts) != len(truth.parts) or mine.mark != truth.mark:
        return False
    if mine.name and truth.name and mine.name != truth.name:
        return False
    if mine.kind in ("list", "union"):
        return _compare_unordered(mine.parts, truth.parts, leaf)
    if mine.kind == "inequality":
        return leaf(_difference(*mine.parts[::-1]), _difference(*truth.parts[::-1]), "+")
    return _all(_compare(one, other, leaf) for one, other in zip(mine.parts, truth.parts, strict=True))


def _contradict(unit: str, other: str) -> bool:
    is_plain_degree = "degree" in (unit, other) and unit.startswith("degree") and other.startswith("degree")
    return bool(unit and other and unit != other and not is_plain_degree)


def _only_element(node: Node) -> Node:
    return node.parts[0] if node.kind in ("list", "union") and len(node.parts) == 1 else node


def _compare_unordered(mine: tuple[Node, ...], truth: tuple[Node, ...], leaf: _Leaf) -> bool | None:
    """Whether each element has one of its own that it is equal to."""
    if _are_named(mine) != _are_named(truth):  # p = 5, q = 2 is 5, 2 and not 2, 5
        return _all(_compare(one, other, leaf) for one, other in zip(mine, truth, strict=True))
    shared = Counter(node.text for node in mine) & Counter(node.text for node in truth)
    mine, truth = _without(mine, shared.copy()), _without(truth, shared.copy())
    if len(mine) > _MAX_UNORDERED:
        return False
    known = [[_compare(one, other, leaf) for other in truth] for one in mine]
    if not _can_pair(known, {True, None}):
        return False
    return True if _can_pair(known, {True}) else None


def _are_named(nodes: tuple[Node, ...]) -> bool:
    """Whether each has a name of its own."""
    names = [tuple(_claims(node)[0]) for node in nodes]
    return len(nodes) > 1 and all(names) and len(set(names)) == len(names)


def _without(nodes: tuple[Node, ...], texts: "Counter[str]") -> tuple[Node, ...]:
    rest = []
    for node in nodes:
        if texts[node.text]:
            texts[node.text] -= 1
        else:
            rest.append(node)
    return tuple(rest)


def _can_pair(known: list[list[bool | None]], good: set[bool | None]) -> bool:
    """Whether rows and columns can be paired so that all pairs are `good`: by augmenting paths."""
    row_of: dict[int, int] = {}

    def place(row: int, seen: set[int]) -> bool:
        for column, value in enumerate(known[row]):
            if value in good and column not in seen:
                seen.add(column)
                if column not in row_of or place(row_of[column], seen):
                    row_of[column] = row
                    return True
        return False

    return all(place(row, set()) for row in range(len(known)))


def _compare_ratios(mine: Node, truth: Node, leaf: _Leaf) -> bool | None:
    sides = [node.parts if node.kind == "ratio" else (node,) for node in (mine, truth)]
    if all(len(side) == 2 and re.fullmatch(r"\d\d", side[1].text) for side in sides):
        return False  # 4:30 is not 2:15, on a clock
    if not all(len(side) == max(map(len, sides)) or (len(side) == 1 and max(map(len, sides)) == 2) for side in sides):
        return False
    mine_by, truth_by = ([_over(part, side[-1]) if len(side) > 1 else part.text for part in side] for side in sides)
    return _all(leaf(one, other, "=") for one, other in zip(mine_by, truth_by, strict=False))


def _over(part: Node, last: Node) -> str:
    return rf"\frac{{{part.text}}}{{{last.text}}}"


def _compare_equations(mine: Node, truth: Node, leaf: _Leaf) -> bool | None:
    """An equation claims what its names are: x = 10/2 = 5 says 5, and 7 = 5 does not. One without a name (a + 3z = 0)
    says no more than itself. Of a gold answer like 0.56 = 56% either side will do."""
    mine, truth = _one_by_one(mine, truth), _one_by_one(truth, mine)
    if mine.kind == truth.kind == "list":
        return _compare(mine, truth, leaf)
    my_names, my_values = _claims(mine)
    true_names, true_values = _claims(truth)
    if mine.kind != "equation":
        return _any(_compare(mine, value, leaf) for value in true_values)
    if truth.kind != "equation":
        return bool(my_values) and _all(_compare(value, truth, leaf) for value in my_values)
    if my_names and true_names and set(my_names) & set(true_names):
        return _all(_any(_compare(one, other, leaf) for other in true_values) for one in my_values)
    if len(mine.parts) != 2 or len(truth.parts) != 2 or any(_WORD.search(name) for name in my_names + true_names):
        return False
    return leaf(_difference(*mine.parts), _difference(*truth.parts), "~")


def _difference(left: Node, right: Node) -> str:
    return f"({left.text})-({right.text})"


def _claims(node: Node) -> tuple[list[str], list[Node]]:
    """The names of an equation, and what they are said to be; of another node no names, and itself."""
    if node.kind != "equation":
        return [], [node]
    named = [
        is_name(side.text) or (side.kind == "tuple" and all(is_name(p.text) for p in side.parts)) for side in node.parts
    ]
    if all(named):  # y = x says x, but f(-x) = f(x) says no value of f
        head = re.split(r"[(_ ]", node.parts[0].text)[0]
        named = [not any(head in side.text for side in node.parts[1:])] + [False] * (len(named) - 1)
    names = [side.text for side, is_one in zip(node.parts, named, strict=True) if is_one]
    values = [side for side, is_one in zip(node.parts, named, strict=True) if not is_one]
    return names, values if names or not any(holds_letters(side.text) for side in values) else []


def _one_by_one(node: Node, other: Node) -> Node:
    """(p, q) = (5, 2) as p = 5, q = 2 beside another list."""
    if node.kind == "equation" and other.kind == "list" and len(node.parts) == 2:
        names, values = node.parts
        if names.kind == values.kind == "tuple" and len(names.parts) == len(values.parts):
            pairs = zip(names.parts, values.parts, strict=True)
            return Node("list", node.text, tuple(Node("equation", f"{a.text}={b.text}", (a, b)) for a, b in pairs))
    return node


# ------------------------------------------------------------------------------------------------------ of leaves

_WORD = re.compile(r"[A-Za-z]{2,}")
_IN_BASE = re.compile(r"(-?[0-9A-Za-z]+)_\{\d+\}")
_CHOICE = re.compile(r"(?:\(([A-Z])\)|([A-Z])[).])(?!\([A-Z]\)).+")  # (B) 5, as a choice with what it says


def _compare_text(mine: str, truth: str, how: str) -> bool | None:
    if mine == truth:
        return True
    if how != "=":
        return None if math_formula.can_be_read(mine) and math_formula.can_be_read(truth) else False
    if is_integer(mine) and is_integer(truth):
        return False
    my_base, true_base = _IN_BASE.fullmatch(mine), _IN_BASE.fullmatch(truth)
    if true_base and re.fullmatch(r"-?\w+", mine):  # a problem that asks for base 7 makes its answer's base plain
        return mine == true_base[1]
    if (my_base and my_base[1][-1].isdigit()) or (my_base and true_base):
        return False
    for one, other in ((mine, truth), (truth, mine)):
        choice = _CHOICE.fullmatch(one)
        if choice:  # no product
            return other in choice.groups()
    equal = _compare_numbers(mine, truth)
    if equal is not None:
        return equal
    if _WORD.fullmatch(mine) and _WORD.fullmatch(truth):  # the letters of a word are no product: listen, silent
        return mine.casefold() == truth.casefold()
    if not (math_formula.can_be_read(mine) and math_formula.can_be_read(truth)):
        without = _without_percent(mine, truth)
        if without is not None:
            return _compare_text(*without, how)
        return mine.replace(" ", "").casefold() == truth.replace(" ", "").casefold() and " " in mine
    return None


def _compare_numbers(mine: str, truth: str) -> bool | None:
    one, other = math_number.read_number(mine), math_number.read_number(truth)
    if one is None or other is None:
        return None
    without = _without_percent(mine, truth)
    return math_number.are_equal(one, other) or (without is not None and _compare_numbers(*without) is True)


def _compare_formulas(mine: str, truth: str, how: str) -> bool:
    as_text = _compare_text(mine, truth, how)
    if as_text is not None:
        return as_text
    if how != "=":
        return math_formula.are_proportional(mine, truth, positive=how == "+")
    return math_formula.are_equal(mine, truth)


def _without_percent(mine: str, truth: str) -> tuple[str, str] | None:
    r"""The pair without its percent signs where they say nothing: both have one, or one has it after a number from 1
    up (12.5\% for 12.5, when a question asks for a percentage; but 0.5\% is not 0.5)."""
    bare = mine.removesuffix(r"\%"), truth.removesuffix(r"\%")
    signs = (bare[0] != mine) + (bare[1] != truth)
    if signs == 2 or (signs == 1 and all(re.match("-?[1-9]", side) for side in bare)):
        return bare
    return None
