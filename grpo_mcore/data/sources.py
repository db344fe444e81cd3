"""Where problems and their answers come from: files, hub data sets, the arithmetic tasks."""

import functools
import json
from pathlib import Path

from grpo_mcore.config import config
from grpo_mcore.config.config import InputError
from grpo_mcore.data import arithmetic, hub
from grpo_mcore.reward.grader import MAX_GOLD_CHARS

# Short name -> hub data set and its split, with columns problem and answer.
PUBLISHED = {"aime24": ("HuggingFaceH4/aime_2024", "train"), "math500": ("HuggingFaceH4/MATH-500", "test")}
KINDS = "a .jsonl or .parquet file nor a data set"


def read_rows(source: str, data: config.Data, name: str) -> list[tuple[str, str]]:
    """(problem, answer) of every row of `source`, a file, a hub data set or a short name of PUBLISHED. `name` is the
    configuration's field, for errors. Raises InputError."""
    if source.startswith("arithmetic:"):
        return arithmetic.rows(source.removeprefix("arithmetic:"))
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    hub_name, split = PUBLISHED.get(source, (source, "train"))
    suffix = Path(source).suffix
    if suffix in (".jsonl", ".json", ".parquet") and not Path(source).is_file():
        raise InputError(name, source, "there is no such file", "check the path")
    if suffix in (".jsonl", ".json"):
        # Not splitlines: it also cuts at U+2028, which JSON leaves bare within strings.
        lines = enumerate(Path(source).read_text().split("\n"), 1)
        places = {f"{name}: {source}, line {i}": line for i, line in lines if line.strip()}
        return [_row(_parse(line, place), data, place) for place, line in places.items()]
    read = (
        functools.partial(load_dataset, "parquet", data_files=source, split="train")
        if suffix == ".parquet"
        else functools.partial(load_dataset, hub_name, split=split)
    )
    table = hub.ask(name, source, KINDS, read, errors=(DatasetsError,))
    return [_row(row, data, f"{name}: {source}, row {i}") for i, row in enumerate(table)]


def _parse(line: str, place: str) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as e:
        raise InputError(place, line[:80], f"is not valid JSON ({e})", "mend the line") from e


def _row(row: object, data: config.Data, place: str) -> tuple[str, str]:
    cells = []
    for key, field in ((data.problem_key, "data.problem_key"), (data.answer_key, "data.answer_key")):
        if not isinstance(row, dict) or key not in row:
            raise InputError(place, row, f"has no column {key!r}", f"set {field}, or mend the row")
        if row[key] is None or not str(row[key]).strip():
            raise InputError(place, row, f"its {key!r} is empty", "mend or remove the row")
        cells.append(str(row[key]))
    problem, answer = cells
    if len(answer) > MAX_GOLD_CHARS:
        raise InputError(
            place,
            answer[:80],
            f"its {data.answer_key!r} has more than {MAX_GOLD_CHARS} characters",
            "check data.answer_key, or remove the row",
        )
    return problem, answer
