"""What `data.train` and `eval.data` name, each source with all of its keys; and the rules of them.

A format has columns of its own: `columns` those that data.problem_key and data.answer_key name, the others theirs.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import PurePath
from typing import Literal

from grpo_mcore.config.config import AnswerFrom, Config, Data, DataFormat, InputError, Source

Given = str | tuple[Source, ...]  # a value of data.train or eval.data
MAX_BLOCK = 100_000  # positions after which a mixture's order of sources repeats
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
DATA_SET_KEYS = ("subset", "split", "revision")


@dataclass(frozen=True)
class Columns:
    """Of a format's rows."""

    problem_key: str
    answer_key: str
    answer_from: AnswerFrom = "column"


OF_FORMAT: dict[str, Columns] = {
    "columns": Columns("problem", "answer"),
    "verl": Columns("prompt", "reward_model.ground_truth"),
    "gsm8k": Columns("question", "answer", "hash"),
}


@dataclass(frozen=True)
class Resolved:
    """A source with all of its keys."""

    field: str  # data.train, eval.data, or data.train[1]: for errors
    path: str
    name: str
    weight: float
    limit: int | None
    subset: str | None
    split: str | None
    revision: str | None
    format: DataFormat
    problem_key: str
    answer_key: str | None  # None: only reward functions say what is right
    answer_regex: str | None
    answer_from: AnswerFrom
    system_prompt: str | None
    takes_chats: bool  # data.chat_template
    is_graded: bool  # a verifier compares the answer, which must be a text
    keys_of: Literal["data", "source", "format"]  # where the keys of its columns stand, for errors

    def field_of(self, key: str) -> str:
        """The configuration's name of a key of this source, for errors."""
        return f"{self.field}.{key}" if self.keys_of == "source" else f"data.{key}"


def of(config: Config, field: str | None = None) -> list[Resolved]:
    """The sources of data.train and eval.data, or of one of them."""
    given = {"data.train": config.data.train, "eval.data": config.eval.data}
    asked = given if field is None else {field: given[field]}
    is_graded = bool(config.reward.verifiers)
    return [source for name, each in asked.items() if each for source in resolved(each, config.data, name, is_graded)]


def resolved(given: Given, data: Data, field: str, is_graded: bool = True) -> list[Resolved]:
    """The sources that `given`, the value of `field`, names. `is_graded`: by a verifier."""
    if isinstance(given, str):
        return [_resolved(Source(given), data, field, is_graded)]
    return [_resolved(source, data, f"{field}[{i}]", is_graded) for i, source in enumerate(given)]


def _resolved(source: Source, data: Data, field: str, is_graded: bool) -> Resolved:
    form = source.format or data.format
    columns = OF_FORMAT[form]
    # The columns of another format are no concern of data's keys.
    base = data if form == data.format else Data(train="", format=form)
    if form != "columns":
        base = dataclasses.replace(base, problem_key=columns.problem_key, answer_key=columns.answer_key)
    by = source if source.answer_regex or source.answer_from else base
    own = any((source.problem_key, source.answer_key, source.answer_regex, source.answer_from))
    return Resolved(
        field=field,
        path=source.path,
        name=source.name or default_name(source.path),
        weight=source.weight,
        limit=source.limit,
        subset=source.subset,
        split=source.split,
        revision=source.revision,
        format=form,
        problem_key=source.problem_key or base.problem_key,
        answer_key=source.answer_key or base.answer_key,
        answer_regex=by.answer_regex,
        answer_from=by.answer_from or ("column" if by.answer_regex else columns.answer_from),
        system_prompt=data.system_prompt if source.system_prompt is None else source.system_prompt,
        takes_chats=data.chat_template,
        is_graded=is_graded,
        keys_of="source" if own else "data" if form == "columns" else "format",
    )


def default_name(path: str) -> str:
    """Of a file its stem; of others all of it, in letters that a name may have."""
    stem = PurePath(path).stem if PurePath(path).suffix in (".jsonl", ".json", ".parquet") else path
    return re.sub(r"[^A-Za-z0-9._-]+", "_", stem).strip("._-") or "data"


def names(given: Given | None) -> list[str]:
    """Of the sources, in their order."""
    sources = () if given is None else (Source(given),) if isinstance(given, str) else given
    return [source.name or default_name(source.path) for source in sources]


def several(given: Given | None) -> list[str]:
    """The names of sources that are told apart: none where there is but one."""
    found = names(given)
    return found if len(found) > 1 else []


def shown(given: Given | None) -> str | None:
    """In a line."""
    return given if given is None or isinstance(given, str) else ", ".join(source.path for source in given)


def weights(given: Given) -> list[float]:
    return [1.0] if isinstance(given, str) else [source.weight for source in given]


def shares(of: Sequence[float]) -> list[int]:
    """Weights as the smallest whole numbers in the same proportion: 0.75 and 0.25 are 3 and 1."""
    exact = [Fraction(str(weight)) for weight in of]
    unit = exact[0]
    for each in exact[1:]:
        unit = Fraction(_gcd(unit, each))
    return [int(each / unit) for each in exact]


def _gcd(a: Fraction, b: Fraction) -> Fraction:
    while b:
        a, b = b, a % b
    return a


# Rules.


def check(config: Config) -> None:
    """Raises InputError."""
    data = config.data
    if data.answer_key is None and config.reward.verifiers:
        raise InputError(
            "data.answer_key", None, f"is what {config.reward.verifiers[0]} compares with", "name the answers' column"
        )
    if data.answer_regex is not None and data.answer_from is not None:
        raise InputError(
            "data.answer_from", data.answer_from, "and data.answer_regex both find the answer", "set one to null"
        )
    if data.format != "columns":
        _check_no_keys("data.", data, Data(train=""), data.format)
    for field, given in (("data.train", data.train), ("eval.data", config.eval.data)):
        if isinstance(given, tuple):
            _check_list(field, given, data)
    if not data.chat_template:
        _check_no_turns(config)
    if sum(shares(weights(data.train))) > MAX_BLOCK:
        raise InputError(
            "data.train",
            ", ".join(f"{weight:g}" for weight in weights(data.train)),
            f"weights make an order that repeats after more than {MAX_BLOCK} prompts",
            "write them with fewer digits",
        )


def _check_no_keys(prefix: str, keys: Data | Source, default: Data | Source, form: str) -> None:
    for name in ("problem_key", "answer_key"):
        if getattr(keys, name) != getattr(default, name):
            raise InputError(
                prefix + name,
                getattr(keys, name),
                f"is another column than format = {form} has ({getattr(OF_FORMAT[form], name)!r})",
                "leave it out, or set the format to columns",
            )


def _check_list(field: str, given: Sequence[Source], data: Data) -> None:
    if not given:
        raise InputError(field, [], "names no source", "name one, as `- path: FILE`")
    found = names(tuple(given))
    for i, source in enumerate(given):
        prefix = f"{field}[{i}]."
        if not NAME.fullmatch(found[i]):
            raise InputError(
                f"{prefix}name", found[i], "is part of metrics' names: letters, digits, ., _ and -", "choose another"
            )
        if found[i] in found[:i]:
            raise InputError(f"{prefix}name", found[i], "is another source's too", "give each a name of its own")
        if source.answer_regex is not None and source.answer_from is not None:
            raise InputError(
                f"{prefix}answer_from", source.answer_from, "and answer_regex both find the answer", "set one to null"
            )
        if field == "eval.data" and source.weight != 1:
            raise InputError(
                f"{prefix}weight", source.weight, "has no meaning in an evaluation, which asks every problem", "drop it"
            )
        if (form := source.format or data.format) != "columns":
            _check_no_keys(prefix, source, Source(""), form)


def _check_no_turns(config: Config) -> None:
    """Raises InputError for what only a chat template has a place for."""
    data = config.data
    told = {"data.system_prompt": data.system_prompt, "data.template_arguments": data.template_arguments}
    for field, given in (("data.train", data.train), ("eval.data", config.eval.data)):
        for i, source in enumerate(given if isinstance(given, tuple) else ()):
            told[f"{field}[{i}].system_prompt"] = source.system_prompt
    for name, value in told.items():
        if value:
            raise InputError(
                name, value, "needs a chat template, and data.chat_template is false", "write it into prompt_template"
            )
