"""Data set -> prompt text -> token ids -> Prompt; a seeded stream of them whose whole state is one number."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer

from grpo_mcore.config import config
from grpo_mcore.config.config import InputError
from grpo_mcore.data import arithmetic
from grpo_mcore.reward.grader import MAX_GOLD_CHARS
from grpo_mcore.types import Prompt

# Short name -> hub data set and its split, with columns problem and answer.
PUBLISHED = {"aime24": ("HuggingFaceH4/aime_2024", "train"), "math500": ("HuggingFaceH4/MATH-500", "test")}


class Tokenizer:
    """The model's tokenizer, its chat template and the ids that end a response."""

    def __init__(self, folder: str):
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        ids: set[int] = set()
        for name in ("config.json", "generation_config.json"):
            path = Path(folder) / name
            value = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
            ids.update([value] if isinstance(value, int) else value or [])
        if self._tokenizer.eos_token_id is not None:
            ids.add(self._tokenizer.eos_token_id)
        self.stop_token_ids = sorted(ids)

    def encode(self, problem: str, data: config.Data) -> tuple[int, ...]:
        text = data.prompt_template.replace("{problem}", problem)
        if not data.chat_template:
            return tuple(self._tokenizer(text).input_ids)
        if self._tokenizer.chat_template is None:
            raise InputError(
                "data.chat_template", True, "the model's tokenizer has no chat template", "set data.chat_template=false"
            )
        return tuple(
            self._tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
            )["input_ids"]
        )

    def encode_plain(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=False).input_ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text with the thinking tags and without end-of-text tokens."""
        stop = set(self.stop_token_ids)
        return self._tokenizer.decode([t for t in token_ids if t not in stop], skip_special_tokens=False)


def read_rows(source: str, data: config.Data, name: str) -> list[tuple[str, str]]:
    """(problem, answer) of every row of `source`, a file, a hub data set or a short name of PUBLISHED. `name` is the
    configuration's field, for errors. Raises InputError."""
    if source.startswith("arithmetic:"):
        return arithmetic.rows(source.removeprefix("arithmetic:"))
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    hub_name, split = PUBLISHED.get(source, (source, "train"))
    suffix = Path(source).suffix
    if suffix in (".jsonl", ".json", ".parquet") and not Path(source).is_file():
        raise InputError(name, source, "there is no such file", "check the path")
    if suffix in (".jsonl", ".json"):
        # Not splitlines: it also cuts at U+2028, which JSON leaves bare within strings.
        lines = enumerate(Path(source).read_text().split("\n"), 1)
        return [
            _row(_parse(line, name, f"{source}, line {i}"), data, name, f"{source}, line {i}")
            for i, line in lines
            if line.strip()
        ]
    try:
        table = (
            load_dataset("parquet", data_files=source, split="train")
            if suffix == ".parquet"
            else load_dataset(hub_name, split=split)
        )
    except (DatasetNotFoundError, ConnectionError, OSError) as e:
        raise InputError(
            name,
            source,
            "is neither a .jsonl or .parquet file nor a data set that can be reached",
            "check the path, or download it first",
        ) from e
    return [_row(row, data, name, f"{source}, row {i}") for i, row in enumerate(table)]


def _parse(line: str, name: str, where: str):
    try:
        return json.loads(line)
    except json.JSONDecodeError as e:
        raise InputError(f"{name}: {where}", line[:80], f"is not valid JSON ({e})", "mend the line") from e


def _row(row: dict, data: config.Data, name: str, where: str) -> tuple[str, str]:
    for key, field in ((data.problem_key, "data.problem_key"), (data.answer_key, "data.answer_key")):
        if not isinstance(row, dict) or key not in row:
            raise InputError(f"{name}: {where}", row, f"has no column {key!r}", f"set {field}, or mend the row")
        if str(row[key] if row[key] is not None else "").strip() == "":
            raise InputError(f"{name}: {where}", row, f"its {key!r} is empty", "mend or remove the row")
    if len(str(row[data.answer_key])) > MAX_GOLD_CHARS:
        raise InputError(
            f"{name}: {where}",
            str(row[data.answer_key])[:80],
            f"its {data.answer_key!r} has more than {MAX_GOLD_CHARS} characters",
            "check data.answer_key, or remove the row",
        )
    return str(row[data.problem_key]), str(row[data.answer_key])


def load(
    source: str, data: config.Data, tokenizer: Tokenizer, name: str, *, overlong: str = "filter"
) -> tuple[list[Prompt], int]:
    """(prompts in the data set's order, number of over-long ones: left out, or with overlong="mask" cut and masked).
    Raises InputError."""
    prompts, too_long = [], 0
    for i, (problem, answer) in enumerate(read_rows(source, data, name)):
        token_ids = tokenizer.encode(problem, data)
        masked = len(token_ids) > data.max_prompt_tokens
        too_long += masked
        if not masked or overlong == "mask":
            prompts.append(Prompt(i, problem, answer, token_ids[: data.max_prompt_tokens], masked))
    if all(p.masked for p in prompts):
        raise InputError(
            name,
            source,
            f"holds no prompt of at most {data.max_prompt_tokens} tokens",
            "raise data.max_prompt_tokens, or check the file",
        )
    return prompts, too_long


class Stream:
    """Endless prompts, shuffled anew each epoch: a position in it is all the state there is.

    `skip`: of the order, the prompts that former stages took: a run goes on where they stopped.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, *, skip: int = 0):
        self._prompts, self._seed, self._skip = prompts, seed, skip
        self._orders: dict[int, list[int]] = {}  # of the epochs last asked for

    def at(self, position: int) -> Prompt:
        epoch, index = divmod(self._skip + position, len(self._prompts))
        return self._prompts[self._order(epoch)[index]]

    def _order(self, epoch: int) -> list[int]:
        order = self._orders.get(epoch)
        if order is None:
            order = list(range(len(self._prompts)))
            random.Random(f"{self._seed}/{epoch}").shuffle(order)
            self._orders = {e: o for e, o in self._orders.items() if e >= epoch - 1} | {epoch: order}
        return order
