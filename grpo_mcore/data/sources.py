"""Where problems and their answers come from: files, hub data sets, the arithmetic tasks."""

import codecs
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from grpo_mcore.config import config, data_sources
from grpo_mcore.config.config import InputError
from grpo_mcore.config.data_sources import DATA_SET_KEYS, Resolved
from grpo_mcore.data import arithmetic, hub, rows
from grpo_mcore.data.rows import Row

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


def read_rows(given: data_sources.Given, data: config.Data, name: str) -> list[Row]:
    """Every row of all that `given`, the value of the configuration's field `name`, names. Raises InputError."""
    return [row for source in data_sources.resolved(given, data, name) for row in read_source(source)]


def read_source(source: Resolved) -> list[Row]:
    """The rows of a file, a hub data set or a short name of PUBLISHED. Raises InputError."""
    if source.path.startswith("arithmetic:"):
        _refuse_keys(source, DATA_SET_KEYS, "is of a data set, and this one is made")
        made = arithmetic.rows(source.path.removeprefix("arithmetic:"))[: source.limit]
        return [Row(problem, answer, {"problem": problem, "answer": answer}) for problem, answer in made]
    there = itertools.islice(_rows(source), source.limit)
    found = [rows.row_of(row, source, f"{source.field}: {source.path}, {place}") for place, row in there]
    if not found:
        raise InputError(source.field, source.path, "holds no row", "check the file")
    return found


def _refuse_keys(source: Resolved, keys: Iterable[str], constraint: str) -> None:
    for key in keys:
        if (value := getattr(source, key)) is not None:
            raise InputError(f"{source.field}.{key}", value, constraint, "leave it out")


def _rows(given: Resolved) -> Iterator[tuple[str, object]]:
    """(where it stands, row)"""
    source, name = given.path, given.field
    path = Path(source)
    try:
        if path.is_file():
            hub.refuse_pointer(name, path)
        elif path.suffix in SUFFIXES or not (path.exists() or MAY_BE_OF_THE_HUB.fullmatch(source)):
            what = "is a folder" if path.is_dir() else "there is no such file"
            raise InputError(name, source, what, "check the path")
        elif path.is_dir() or not path.exists():
            if path.is_dir():
                _refuse_keys(given, ["revision"], "is of a data set of the hub, and this is a folder")
            yield from _of_data_set(given)
            return
        _refuse_keys(given, DATA_SET_KEYS, "is of a data set, and this is a file")
        if path.suffix not in SUFFIXES:
            raise InputError(name, source, f"is no {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file", AS_FILE)
        yield from _of_parquet(source, name) if path.suffix == ".parquet" else _of_json(path, name)
    except OSError as e:
        raise InputError(name, source, f"cannot be read ({e.strerror})", "check the path and its rights") from None


def _of_json(path: Path, name: str) -> Iterator[tuple[str, object]]:
    text = _text(path, name)
    if path.suffix == ".json" and text.lstrip().startswith("["):
        parsed = _parsed(text, f"{name}: {path}", "mend it")
        assert isinstance(parsed, list)
        yield from ((f"row {i}", row) for i, row in enumerate(parsed))
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
        table = pa.parquet.read_table(source).to_pylist()
    except Exception as e:  # of many classes: a date may be beyond Python's, a cut file ask for all memory
        why = (str(e).splitlines() or [type(e).__name__])[0]
        raise InputError(name, source, f"cannot be read as parquet ({why})", "check the file") from None
    for i, row in enumerate(table):
        yield f"row {i}", row


def _of_data_set(given: Resolved) -> Iterator[tuple[str, object]]:
    from datasets import load_dataset

    source, name = given.path, given.field
    hub_name, split = PUBLISHED.get(source, (source, "train"))
    split = given.split or split

    def load() -> Iterable[object]:
        try:
            found: Iterable[object] = load_dataset(hub_name, given.subset, split=split, revision=given.revision)
            return found
        except Exception as e:  # a folder of other things is said by any class
            if isinstance(e, hub.NOT_THERE) and not Path(source).exists():
                raise  # it is not there
            raise _unreadable(e, source, name, split) from None

    found = hub.ask(name, source, KINDS, load)
    try:
        yield from ((f"row {i}", row) for i, row in enumerate(found))
    except Exception as e:  # a text that is none, a picture without its reader
        raise _unreadable(e, source, name, split) from None


def _unreadable(e: Exception, source: str, name: str, split: str) -> InputError:
    """What is said of a data set that is there. Raises InputError for a pointer in its folder."""
    for file in filter(Path.is_file, Path(source).rglob("*")):
        hub.refuse_pointer(name, file)
    why = " ".join(str(e.__cause__ or e).split())
    if any(words in why for words in NOT_ONE_SPLIT):
        remedy = f"name one of its subsets and splits ({name}: a list of {{path, subset, split}}), or {AS_FILE}"
        return InputError(name, source, f"has no one data set of a split {split!r} ({why})", remedy)
    return InputError(name, source, f"cannot be read as rows ({type(e).__name__}: {why})", AS_FILE)
