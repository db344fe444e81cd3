"""Problem -> prompt text -> token ids -> Prompt; a seeded stream of them whose whole state is one number."""

import hashlib
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from grpo_mcore.config import config
from grpo_mcore.config.config import InputError
from grpo_mcore.data.sources import read_rows
from grpo_mcore.types import Prompt

TOKENIZER_FILES = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "chat_template")


class Tokenizer:
    """The model's tokenizer, its chat template and the ids that end a response."""

    def __init__(self, folder: str):
        """Raises InputError if it cannot be read, and for ids that the model does not have."""
        self._vocab_size: int = _read(Path(folder) / "config.json").get("vocab_size", sys.maxsize)
        ids: set[int] = set()
        for name in ("config.json", "generation_config.json"):
            path = Path(folder) / name
            ids.update(self._stop_ids(path) if path.is_file() else ())
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder)
        except Exception as e:  # tokenizers has no class for it
            why = (str(e).splitlines() or [""])[0]
            files = sorted(f.name for f in Path(folder).iterdir() if f.name.startswith(TOKENIZER_FILES))
            raise InputError(
                "model",
                folder,
                f"has a tokenizer that cannot be read ({type(e).__name__}: {why})",
                f"copy its files again from where the model came from: {', '.join(files)}",
            ) from e
        if self._tokenizer.eos_token_id is not None:
            ids.add(self._tokenizer.eos_token_id)
        if beyond := [i for i in ids if i >= self._vocab_size]:
            raise InputError(
                "model",
                folder,
                f"ends texts by token {beyond[0]}, and has {self._vocab_size} (vocab_size in config.json)",
                "mend eos_token_id or the tokenizer: they are another model's",
            )
        if not ids:
            raise InputError(
                "model",
                folder,
                "names no token that ends a text: no response would end",
                "write eos_token into tokenizer_config.json, or eos_token_id into generation_config.json",
            )
        self.stop_token_ids = sorted(ids)

    def _stop_ids(self, path: Path) -> list[int]:
        value = _read(path).get("eos_token_id")
        values = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in values):
            raise InputError("model", str(path), f"eos_token_id is {value!r}, and no token's id", "write ids")
        return values

    def encode(self, problem: str, data: config.Data, place: str = "a prompt") -> tuple[int, ...]:
        """`place` names the prompt, for errors. Raises InputError for what no engine can go on from."""
        text = data.prompt_template.replace("{problem}", problem)
        token_ids = self._encode(text, data, place)
        if found := self._problem_with(token_ids):
            raise InputError(place, text, *found)
        return token_ids

    def _problem_with(self, token_ids: Sequence[int]) -> tuple[str, str] | None:
        """(what is wrong with a prompt's tokens, remedy)"""
        bos = self._tokenizer.bos_token_id
        if not token_ids:
            return "has no token", "mend the row, or the tokenizer, whose vocabulary lacks its characters"
        if max(token_ids) >= self._vocab_size:
            return (
                f"has token {max(token_ids)}, and the model has {self._vocab_size} (vocab_size in config.json)",
                "mend the row or data.prompt_template, or name the tokenizer that the model was trained with",
            )
        if token_ids[-1] in self.stop_token_ids:
            return (
                f"ends with token {token_ids[-1]}, which ends a text: there would be nothing to answer",
                "set add_eos_token to false in tokenizer_config.json, or mend the chat template",
            )
        if bos is not None and bos not in self.stop_token_ids and token_ids[:2] == (bos, bos):
            return (
                f"begins with two tokens {bos}, which begins a text",
                "take it out of data.prompt_template, which the tokenizer puts it before",
            )
        return None

    def _encode(self, text: str, data: config.Data, place: str) -> tuple[int, ...]:
        if not data.chat_template:
            try:
                return tuple(self._tokenizer(text).input_ids)
            except Exception as e:  # tokenizers has no class for it
                raise InputError(place, text, f"cannot be made tokens ({e})", "mend data.prompt_template") from e
        if self._tokenizer.chat_template is None:
            raise InputError(
                "data.chat_template", True, "the model's tokenizer has no chat template", "set data.chat_template=false"
            )
        chat = [{"role": "user", "content": text}]
        try:
            encoded = self._tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
        except Exception as e:  # a template may compute what it likes
            why = (str(e).splitlines() or [""])[0]
            raise InputError(
                "data.chat_template",
                True,
                f"the tokenizer's template cannot be applied to {place} ({type(e).__name__}: {why})",
                "mend the template, or set data.chat_template=false",
            ) from e
        return tuple(encoded["input_ids"])

    def encode_plain(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=False).input_ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text with the thinking tags and without end-of-text tokens."""
        kept = [t for t in token_ids if t not in self.stop_token_ids]
        text: str = self._tokenizer.decode(kept, skip_special_tokens=False)
        return text


def _read(path: Path) -> dict[str, Any]:
    """A JSON file of a model's folder. Raises InputError."""
    try:
        tree = json.loads(path.read_text())
    except ValueError as e:
        raise InputError("model", str(path), f"is not valid JSON ({e})", "copy it again") from None
    if not isinstance(tree, dict):
        raise InputError("model", str(path), "is no JSON object", "copy it again")
    return tree


def load(
    source: str, data: config.Data, tokenizer: Tokenizer, name: str, *, overlong: str = "filter"
) -> tuple[list[Prompt], int]:
    """(prompts in the data set's order, number of over-long ones: left out, or with overlong="mask" cut and masked).
    Raises InputError."""
    prompts, too_long = [], 0
    for i, row in enumerate(read_rows(source, data, name)):
        token_ids = tokenizer.encode(row.problem, data, f"{name}: {source}, prompt {i}")
        masked = len(token_ids) > data.max_prompt_tokens
        too_long += masked
        if not masked or overlong == "mask":
            prompts.append(Prompt(i, row.problem, row.answer, token_ids[: data.max_prompt_tokens], masked, row.columns))
    if len({p.token_ids for p in prompts}) == 1 < len({p.problem for p in prompts}):
        field = "data.chat_template" if data.chat_template else "data.max_prompt_tokens"
        raise InputError(
            field, getattr(data, field[5:]), "makes the same tokens of every problem", "see that the problem is in them"
        )
    if all(p.masked for p in prompts):
        raise InputError(
            name,
            source,
            f"holds no prompt of at most {data.max_prompt_tokens} tokens",
            "raise data.max_prompt_tokens, or check the file",
        )
    return prompts, too_long


def digest(prompts: Sequence[Prompt]) -> str:
    """Of all that a run learns from them: token ids and answers, in their order."""
    sha = hashlib.sha256()
    for p in prompts:
        sha.update(json.dumps([p.token_ids, p.answer, p.masked]).encode())
    return sha.hexdigest()[:16]


def load_evaluation(cfg: config.Config, tokenizer: Tokenizer) -> tuple[list[Prompt], int]:
    """(the prompts of eval.data, over-long ones left out, the first eval.max_prompts of them; how many were left out up
    to the last). Raises InputError."""
    assert cfg.eval.data is not None
    prompts, num_left_out = load(cfg.eval.data, cfg.data, tokenizer, "eval.data")
    kept = prompts[: cfg.eval.max_prompts]
    # An id is the position in the data set.
    return kept, num_left_out if len(kept) == len(prompts) else kept[-1].id + 1 - len(kept)


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
