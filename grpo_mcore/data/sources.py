"""Where problems and their answers come from: files, hub data sets, the arithmetic tasks."""

import codecs
import decimal
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_mcore.config import config
from grpo_mcore.config.config import InputError
from grpo_mcore.data import arithmetic, hub
from grpo_mcore.reward.grader import MAX_GOLD_CHARS

# Short name -> hub data set and its split, with columns problem and answer.
PUBLISHED = {"aime24": ("HuggingFaceH4/aime_2024", "train"), "math500": ("HuggingFaceH4/MATH-500", "test")}
KINDS = "a .jsonl, .json or .parquet file nor a data set"
AS_FILE = "save the rows as a .jsonl or .parquet file, and name that"
# What `datasets` says of a data set that is there, of which something else is to be said than of one that is not.
NOT_ONE_SPLIT = ("Config name is missing", "BuilderConfig", "Unknown split", "Bad split")

SUFFIXES = (".jsonl", ".json", ".parquet")
MAY_BE_OF_THE_HUB = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
# What a file of other encodings begins with; the longer ones first.
MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
SURROGATE = re.compile("[\ud800-\udfff]")
NUMBERS = (int, float, decimal.Decimal)


@dataclass(frozen=True)
class Row:
    problem: str
    answer: str
    columns: Mapping[str, Any]  # all that the data set has of it


def read_rows(source: str, data: config.Data, name: str) -> list[Row]:
    """Every row of `source`, a file, a hub data set or a short name of PUBLISHED. `name` is the configuration's field,
    for errors. Raises InputError."""
    if source.startswith("arithmetic:"):
        made = arithmetic.rows(source.removeprefix("arithmetic:"))
        return [Row(problem, answer, {"problem": problem, "answer": answer}) for problem, answer in made]
    rows = [_row(row, data, f"{name}: {source}, {place}") for place, row in _rows(source, name)]
    if not rows:
        raise InputError(name, source, "holds no row", "check the file")
    return rows


def _rows(source: str, name: str) -> Iterator[tuple[str, object]]:
    """(where it stands, row)"""
    path = Path(source)
    try:
        if path.is_file():
            hub.refuse_pointer(name, path)
        elif path.suffix in SUFFIXES or not (path.exists() or MAY_BE_OF_THE_HUB.fullmatch(source)):
            what = "is a folder" if path.is_dir() else "there is no such file"
            raise InputError(name, source, what, "check the path")
        elif path.is_dir() or not path.exists():
            yield from _of_data_set(source, name)
            return
        if path.suffix not in SUFFIXES:
            raise InputError(name, source, f"is no {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file", AS_FILE)
        yield from _of_parquet(source, name) if path.suffix == ".parquet" else _of_json(path, name)
    except OSError as e:
        raise InputError(name, source, f"cannot be read ({e.strerror})", "check the path and its rights") from None


def _of_json(path: Path, name: str) -> Iterator[tuple[str, object]]:
    text = _text(path, name)
    if path.suffix == ".json" and text.lstrip().startswith("["):
        rows = _parsed(text, f"{name}: {path}", "mend it")
        assert isinstance(rows, list)
        yield from ((f"row {i}", row) for i, row in enumerate(rows))
        return
    remedy = "write one row a line" if text.lstrip()[:2] in ("[", "[\n", "{", "{\n") else "mend the line"
    # Not splitlines: it also cuts at U+2028, which JSON leaves bare within strings.
    for i, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"line {i}", _parsed(line, f"{name}: {path}, line {i}", remedy)


def _text(path: Path, name: str) -> str:
    raw = path.read_bytes()
    marked = next((encoding for mark, encoding in MARKS.items() if raw.startswith(mark)), None)
    if b"\0" in raw and not marked:
        raise InputError(name, str(path), "holds bytes of zero, and is no text", "unpack it, or convert it to UTF-8")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = raw.count(b"\n", 0, e.start) + 1
        raise InputError(
            f"{name}: {path}, line {line}",
            raw[max(e.start - 20, 0) : e.start + 20],
            "is not UTF-8",
            f"convert the file: iconv -f {marked or 'LATIN1'} -t UTF-8",
        ) from None
    return text


def _parsed(text: str, place: str, remedy: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:  # the latter, and numbers of thousands of digits, are JSON, but no row
        raise InputError(place, text[:80], f"is not valid JSON ({e})", remedy) from None


def _of_parquet(source: str, name: str) -> Iterator[tuple[str, object]]:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        rows = pa.parquet.read_table(source).to_pylist()
    except Exception as e:  # of many classes: a date may be beyond Python's, a cut file ask for all memory
        why = (str(e).splitlines() or [type(e).__name__])[0]
        raise InputError(name, source, f"cannot be read as parquet ({why})", "check the file") from None
    for i, row in enumerate(rows):
        yield f"row {i}", row


def _of_data_set(source: str, name: str) -> Iterator[tuple[str, object]]:
    from datasets import load_dataset

    hub_name, split = PUBLISHED.get(source, (source, "train"))

    def load() -> Iterable[object]:
        try:
            rows: Iterable[object] = load_dataset(hub_name, split=split)
            return rows
        except Exception as e:  # a folder of other things is said by any class
            if isinstance(e, hub.NOT_THERE) and not Path(source).exists():
                raise  # it is not there
            raise _unreadable(e, source, name, split) from None

    rows = hub.ask(name, source, KINDS, load)
    try:
        yield from ((f"row {i}", row) for i, row in enumerate(rows))
    except Exception as e:  # a text that is none, a picture without its reader
        raise _unreadable(e, source, name, split) from None


def _unreadable(e: Exception, source: str, name: str, split: str) -> InputError:
    """What is said of a data set that is there. Raises InputError for a pointer in its folder."""
    for file in filter(Path.is_file, Path(source).rglob("*")):
        hub.refuse_pointer(name, file)
    why = " ".join(str(e.__cause__ or e).split())
    if any(words in why for words in NOT_ONE_SPLIT):
        return InputError(name, source, f"has no one data set of a split {split!r} ({why})", AS_FILE)
    return InputError(name, source, f"cannot be read as rows ({type(e).__name__}: {why})", AS_FILE)


def _row(row: object, data: config.Data, place: str) -> Row:
    problem = _cell(row, data.problem_key, "data.problem_key", place)
    answer = _cell(row, data.answer_key, "data.answer_key", place)
    if data.answer_regex is not None:
        found = re.search(data.answer_regex, answer)
        if not found or not (found[1] or "").strip():
            raise InputError(
                place,
                answer[-80:],
                f"its {data.answer_key!r} does not match data.answer_regex = {data.answer_regex!r}",
                "mend the pattern, or remove the row",
            )
        answer = found[1].strip()
    if len(answer) > MAX_GOLD_CHARS:
        raise InputError(
            place,
            answer[:80],
            f"its {data.answer_key!r} has more than {MAX_GOLD_CHARS} characters",
            "check data.answer_key, or remove the row",
        )
    assert isinstance(row, dict)
    return Row(problem, answer, row)


def _cell(row: object, key: str, field: str, place: str) -> str:
    """A column's text: a text that is not blank, or a number, in digits."""
    if not isinstance(row, dict):
        raise InputError(place, row, f"is of type {type(row).__name__}, where a row belongs", "write each as an object")
    if key not in row:
        there = f" (there are {', '.join(map(repr, row))})" if row else ""
        raise InputError(place, row, f"has no column {key!r}", f"set {field}{there}, or mend the row")
    value = row[key]
    if value is None or (isinstance(value, str) and not any(c.isprintable() and c != " " for c in value)):
        raise InputError(place, row, f"its {key!r} is empty", "mend or remove the row")
    is_number = isinstance(value, NUMBERS) and not isinstance(value, bool)
    if is_number and (isinstance(value, int) or math.isfinite(value)):
        return f"{decimal.Decimal(str(value)):f}"  # some verifiers know no 1e+22
    if not isinstance(value, str):
        what = f"is {value}" if is_number else f"is of type {type(value).__name__}"
        raise InputError(
            place, value, f"its {key!r} {what}, where a text or a number belongs", f"set {field}, or mend the row"
        )
    if SURROGATE.search(value):
        raise InputError(place, value, f"its {key!r} has half of a character (a lone surrogate)", "mend the row")
    return value
