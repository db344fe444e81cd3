"""Verifiers of answers that stand on a line of their own.

dapo     what follows the last "Answer:" in the last 300 characters, spelled in one way and compared as text: the rules
         of DAPO's run (arXiv 2503.14476), which took the spelling from Minerva (arXiv 2206.14858, appendix D.1)
gsm8k    the number after the last "####", compared as a number (arXiv 2110.14168 writes answers so)
"""

import decimal
import re

LAST_CHARS = 300
_ANSWER = re.compile(r"answer\s*:\s*([^\n]+)", re.IGNORECASE)
_HASH = re.compile(r"####\s*\$?\s*(-?\$?[\d.,]*\d)")

# As Minerva spells an answer: in this order, whatever they stand in.
_SPELLED = (("an ", ""), ("a ", ""), (".$", "$"), (r"\$", ""), ("\\ ", ""), (" ", ""), ("mbox", "text"))
_LISTS = ((r",\text{and}", ","), (r"\text{and}", ","), (r"\text{m}", r"\text{}"))
_UNITS = (
    "square ways integers dollars mph inches hours km units \\ldots sue points feet minutes digits cents degrees cm gm "
    "pounds meters meals edges students childrentickets multiples"
).split()
_MARKS = [
    *(r"\text{s}", r"\text{.}", "\\text{\ns}", r"\text{}^2", r"\text{}^3", "\\text{\n}", r"\text{}", r"\mathrm{th}"),
    *(r"^\circ", r"^{\circ}", r"\;", r",\!", "{,}", '"', r"\dots"),
]
_WRAPPED = [re.compile(p) for p in (r"\\text\{(.*?)\}", r"\\textbf\{(.*?)\}", r"\\overline\{(.*?)\}")]


def extract_dapo(text: str) -> str | None:
    """The rest of the line after the last "Answer:"."""
    found = _ANSWER.findall(text[-LAST_CHARS:])
    return (found[-1].strip() or None) if found else None


def spell_dapo(answer: str) -> str:
    r"""
    >>> spell_dapo(r"x = $\frac12$ dollars"), spell_dapo("1,234")
    ('\\frac{1}{2}', '1234')
    """
    answer = answer.split("=")[-1]
    for old, new in (*_SPELLED, *_LISTS, *((mark, "") for mark in (*_UNITS, *_MARKS))):
        answer = answer.replace(old, new)
    answer = re.sub(r"^.*?\$(.*?)\$.*", r"$\1$", answer, count=1)
    for wrapped in _WRAPPED:
        answer = wrapped.sub(r"\1", answer)
    answer = re.sub(r"\\boxed\{(.*)\}", r"\1", answer)
    answer = re.sub(r"frac([^{])(.)", r"frac{\1}{\2}", answer)
    answer = re.sub(r"sqrt([^{])", r"sqrt{\1}", answer).replace("$", "")
    digits = answer.replace(",", "")
    return (digits if digits.isdigit() else answer).strip()


def compare_dapo(answer: str, gold: str) -> tuple[bool, str]:
    return spell_dapo(answer) == spell_dapo(gold), "text"


def extract_gsm8k(text: str) -> str | None:
    """The number after the last ####."""
    found = _HASH.findall(text[-LAST_CHARS:])
    return spell_gsm8k(found[-1]) if found else None


def spell_gsm8k(answer: str) -> str:
    return re.sub(r"[,$\s]", "", answer)


def compare_gsm8k(answer: str, gold: str) -> tuple[bool, str]:
    try:
        return decimal.Decimal(spell_gsm8k(answer)) == decimal.Decimal(spell_gsm8k(gold)), "number"
    except decimal.InvalidOperation:
        return spell_gsm8k(answer) == spell_gsm8k(gold), "text"
