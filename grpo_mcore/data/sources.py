"""Where problems and their answers come from: files, hub data sets, the arithmetic tasks."""

import decimal
import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

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

POINTER, UTF_16 = b"version https://git-lfs", (b"\xff\xfe", b"\xfe\xff")
SURROGATE = re.compile("[\ud800-\udfff]")
NUMBERS = (int, float, decimal.Decimal)


def read_rows(source: str, data: config.Data, name: str) -> list[tuple[str, str]]:
    """(problem, answer) of every row of `source`, a file, a hub data set or a short name of PUBLISHED. `name` is the
    configuration's field, for errors. Raises InputError."""
    if source.startswith("arithmetic:"):
        return arithmetic.rows(source.removeprefix("arithmetic:"))
    rows = [_row(row, data, f"{name}: {source}, {place}") for place, row in _rows(source, name)]
    if not rows:
        raise InputError(name, source, "holds no row", "check the file")
    return rows


def _rows(source: str, name: str) -> Iterator[tuple[str, object]]:
    """(where it stands, row)"""
    path = Path(source)
    if path.suffix not in (".jsonl", ".json", ".parquet"):
        return _of_data_set(source, name)
    if not path.is_file():
        raise InputError(name, source, "there is no such file", "check the path")
    with path.open("rb") as f:
        if f.read(len(POINTER)) == POINTER:
            raise InputError(name, source, "is Git LFS's pointer to a file, and not the file", "run git lfs pull")
    return _of_parquet(source, name) if path.suffix == ".parquet" else _of_json(path, name)


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
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = raw.count(b"\n", 0, e.start) + 1
        raise InputError(
            f"{name}: {path}, line {line}",
            raw[max(e.start - 20, 0) : e.start + 20],
            "is not UTF-8",
            f"convert the file: iconv -f {'UTF-16' if raw[:2] in UTF_16 else 'LATIN1'} -t UTF-8",
        ) from None
    if "\0" in text:
        raise InputError(name, str(path), "holds bytes of zero, and is no text", "convert the file to UTF-8")
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
    except (OSError, ValueError, pa.ArrowException) as e:
        why = (str(e).splitlines() or [""])[0]
        raise InputError(name, source, f"cannot be read as parquet ({why})", "check the file") from None
    for i, row in enumerate(rows):
        yield f"row {i}", row


def _of_data_set(source: str, name: str) -> Iterator[tuple[str, object]]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetsError

    hub_name, split = PUBLISHED.get(source, (source, "train"))

    def load() -> Iterable[object]:
        try:
            rows: Iterable[object] = load_dataset(hub_name, split=split)
            return rows
        except Exception as e:  # a folder of other things is said by any class
            why = " ".join(str(e.__cause__ or e).split())
            if any(words in why for words in NOT_ONE_SPLIT):
                raise InputError(name, source, f"has no one data set of a split {split!r} ({why})", AS_FILE) from None
            if Path(source).exists() or isinstance(e, DatasetGenerationError):
                raise InputError(name, source, f"cannot be read as rows ({type(e).__name__}: {why})", AS_FILE) from None
            raise

    for i, row in enumerate(hub.ask(name, source, KINDS, load, errors=(DatasetsError,))):
        yield f"row {i}", row


def _row(row: object, data: config.Data, place: str) -> tuple[str, str]:
    problem = _cell(row, data.problem_key, "data.problem_key", place)
    answer = _cell(row, data.answer_key, "data.answer_key", place)
    if data.answer_regex is not None:
        found = re.search(data.answer_regex, answer)
        if not found or not found[1].strip():
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
    return problem, answer


def _cell(row: object, key: str, field: str, place: str) -> str:
    """A column's text: a text that is not blank, or a number as it is written."""
    if not isinstance(row, dict) or key not in row:
        there = f" (there are {', '.join(map(repr, row))})" if isinstance(row, dict) and row else ""
        raise InputError(place, row, f"has no column {key!r}", f"set {field}{there}, or mend the row")
    value = row[key]
    if value is None or (isinstance(value, str) and not value.strip()):
        raise InputError(place, row, f"its {key!r} is empty", "mend or remove the row")
    is_number = isinstance(value, NUMBERS) and not isinstance(value, bool)
    if is_number and (isinstance(value, int) or math.isfinite(value)):
        return str(value)
    if not isinstance(value, str):
        what = f"is {value}" if is_number else f"is of type {type(value).__name__}"
        raise InputError(
            place, value, f"its {key!r} {what}, where a text or a number belongs", f"set {field}, or mend the row"
        )
    if SURROGATE.search(value):
        raise InputError(place, value, f"its {key!r} has half of a character (a lone surrogate)", "mend the row")
    return value
