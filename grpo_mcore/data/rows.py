"""One row of a data set: its columns become a problem, or the turns of a chat, and the right answer."""

import decimal
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grpo_mcore.config.config import InputError
from grpo_mcore.config.data_sources import Resolved
from grpo_mcore.reward.grader import MAX_GOLD_CHARS
from grpo_mcore.reward.verifiers import VERIFIERS

SURROGATE = re.compile("[\ud800-\udfff]")
NUMBERS = (int, float, decimal.Decimal)
ROLES = ("system", "user", "assistant")
# 1,234.5 and .5: commas stand between groups of three digits alone, and the - of 10-3 is no sign
NUMBER = re.compile(r"(?:(?<![\w)\]}])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)")

Message = Mapping[str, Any]  # role, content and what else the chat template reads


@dataclass(frozen=True)
class Row:
    problem: str  # of a chat its last turn's text
    answer: str
    columns: Mapping[str, Any]  # all that the data set has of it
    messages: tuple[Message, ...] = ()  # the chat; none: the problem is a text
    gold: object = None  # the answer's column, where it is no text and only functions read it; None: it is a text


def row_of(row: object, source: Resolved, place: str) -> Row:
    """`row` as `source` reads it. `place` names it, for errors. Raises InputError."""
    if not isinstance(row, dict):
        raise InputError(place, row, f"is of type {type(row).__name__}, where a row belongs", "write each as an object")
    value = _column(row, "problem_key", source, place)
    messages: tuple[Message, ...] = ()
    if isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
        messages = _messages(value, source, place)
        problem = messages[-1]["content"]
    else:
        problem = _text(row, value, "problem_key", source, place)
    if source.answer_key is None:
        return Row(problem, "", row, messages)
    value = _column(row, "answer_key", source, place)
    if not source.is_graded and isinstance(value, (dict, list)):
        return Row(problem, json.dumps(value, default=str), row, messages, value)
    return Row(problem, _answer(row, value, source, place), row, messages)


def _column(row: Mapping[str, Any], which: str, source: Resolved, place: str) -> object:
    """The value of a column; `a.b` leads into the mapping `a`, where no column's name is `a.b`. Raises InputError."""
    key: str = getattr(source, which)
    value: Any = row
    names = [key] if key in row else key.split(".")
    for depth, name in enumerate(names):
        if not isinstance(value, dict) or name not in value:
            inner, within = value if isinstance(value, dict) else {}, ".".join(names[:depth])
            there = f" (there are {', '.join(map(repr, inner))}{f' in {within!r}' * bool(within)})" if inner else ""
            raise InputError(place, row, f"has no column {key!r}", f"{_set(which, source)}{there}, or mend the row")
        value = value[name]
    return value


def _set(which: str, source: Resolved) -> str:
    """The remedy of a column that is another's."""
    if source.keys_of == "format":
        return f"set a format other than {source.format}"
    return f"set {source.field_of(which)}"


def _text(row: Mapping[str, Any], value: object, which: str, source: Resolved, place: str) -> str:
    """A column's text: a text that is not blank, or a number, in digits."""
    key = getattr(source, which)
    if value is None or _is_blank(value):
        raise InputError(place, row, f"its {key!r} is empty", "mend or remove the row")
    is_number = isinstance(value, NUMBERS) and not isinstance(value, bool)
    if is_number and (isinstance(value, int) or math.isfinite(value)):  # type: ignore[arg-type]
        return f"{decimal.Decimal(str(value)):f}"  # some verifiers know no 1e+22
    if not isinstance(value, str):
        what = f"is {value}" if is_number else f"is of type {type(value).__name__}"
        raise InputError(
            place,
            value,
            f"its {key!r} {what}, where a text or a number belongs",
            f"{_set(which, source)}, or mend the row",
        )
    _refuse_surrogate(value, key, place)
    return value


def _is_blank(value: object) -> bool:
    return isinstance(value, str) and not any(c.isprintable() and c != " " for c in value)


def _refuse_surrogate(text: str, key: str, place: str) -> None:
    if SURROGATE.search(text):
        raise InputError(place, text, f"its {key!r} has half of a character (a lone surrogate)", "mend the row")


def _messages(value: list[dict[str, Any]], source: Resolved, place: str) -> tuple[Message, ...]:
    """The turns of a chat that the next answer ends. Raises InputError."""
    key = source.problem_key

    def refuse(seen: object, constraint: str, remedy: str = "mend or remove the row") -> InputError:
        return InputError(place, seen, f"its {key!r} {constraint}", remedy)

    if not source.takes_chats:
        raise refuse(value[-1], "is a chat, and data.chat_template is false", "set it to true, or name another column")
    found = []
    for i, message in enumerate(value):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise refuse(message, f"has a message of role {role!r}", f"name one of {', '.join(ROLES)}")
        if not isinstance(content, str) or _is_blank(content):
            raise refuse(message, "has a message without a text in its content")
        if role == "system" and i:
            raise refuse(message, "has a system message behind another", "put it first")
        _refuse_surrogate(content, key, place)
        # A table has all columns of all messages: null is none.
        found.append({name: each for name, each in message.items() if each is not None})
    if found[-1]["role"] != "user":
        raise refuse(
            found[-1],
            f"ends with a message of the {found[-1]['role']}, and the answer is to the user's",
            "end it with the user's message",
        )
    if found[0]["role"] == "system" and source.system_prompt is not None:
        raise refuse(found[0], "has a system message of its own, and system_prompt is set", "drop one of them")
    return tuple(found)


def _answer(row: Mapping[str, Any], value: object, source: Resolved, place: str) -> str:
    """Raises InputError."""
    text = _text(row, value, "answer_key", source, place)
    answer = _taken(text, source)
    if answer is None or not answer.strip():
        how = (
            f"answer_regex = {source.answer_regex!r}" if source.answer_regex else f"answer_from = {source.answer_from}"
        )
        if source.answer_regex:
            constraint = f"does not match {'data.' * (source.keys_of == 'data')}{how}"
        else:
            constraint = f"has no answer by {how}"
        raise InputError(
            place, text[-80:], f"its {source.answer_key!r} {constraint}", "mend the pattern, or remove the row"
        )
    answer = answer if answer is text else answer.strip()
    if len(answer) > MAX_GOLD_CHARS:
        raise InputError(
            place,
            answer[:80],
            f"its {source.answer_key!r} has more than {MAX_GOLD_CHARS} characters",
            f"check {source.field_of('answer_key')}, or remove the row",
        )
    return answer


def _taken(text: str, source: Resolved) -> str | None:
    """The answer in its column's text; None: it is not there."""
    if source.answer_regex is not None:
        found = re.search(source.answer_regex, text)
        return found[1] if found else None
    match source.answer_from:
        case "column":
            return text
        case "boxed":
            return VERIFIERS["math_verify"].extract(text)
        case "last_number":
            numbers = NUMBER.findall(text)
            return numbers[-1].replace(",", "") if numbers else None
        case "hash":
            _, mark, behind = text.rpartition("####")
            return behind.strip().partition("\n")[0] if mark else None
