"""Problem or chat -> prompt text -> token ids -> Prompt; a seeded stream of them whose whole state is one number."""

import hashlib
import inspect
import json
import random
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from grpo_mcore.config import config, data_sources
from grpo_mcore.config.config import InputError
from grpo_mcore.config.data_sources import Given, Resolved
from grpo_mcore.data.mixture import Mixture
from grpo_mcore.data.rows import Message
from grpo_mcore.data.sources import read_source
from grpo_mcore.types import Prompt

TOKENIZER_FILES = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "chat_template")


class Tokenizer:
    """The model's tokenizer, its chat template and the ids that end a response."""

    def __init__(self, folder: str):
        """Raises InputError if it cannot be read, and for ids that the model does not have."""
        self.tools: list[Mapping[str, Any]] = []  # schemas that the chat template tells the model
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
        """Of a problem that is a text. `place` names the prompt, for errors. Raises InputError for what no engine can
        go on from."""
        return self.encode_chat(chat_of(problem, (), data, data.system_prompt), data, place)

    def encode_chat(self, chat: Sequence[Message], data: config.Data, place: str) -> tuple[int, ...]:
        """Of a chat, to its last turn. Without a chat template of a single turn, as it is. Raises InputError."""
        text: str = chat[-1]["content"]
        token_ids = self._templated(chat, data, place) if data.chat_template else self._plain(text, data, place)
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

    def _plain(self, text: str, data: config.Data, place: str) -> tuple[int, ...]:
        try:
            return tuple(self._tokenizer(text).input_ids)
        except Exception as e:  # tokenizers has no class for it
            raise InputError(place, text, f"cannot be made tokens ({e})", "mend data.prompt_template") from e

    def _templated(self, chat: Sequence[Message], data: config.Data, place: str) -> tuple[int, ...]:
        if self._tokenizer.chat_template is None:
            raise InputError(
                "data.chat_template", True, "the model's tokenizer has no chat template", "set data.chat_template=false"
            )
        self._check_arguments(data.template_arguments)
        turns = [dict(message) for message in chat]
        try:
            encoded = self._tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, return_dict=True, **self._of_template(data)
            )
        except Exception as e:  # a template may compute what it likes
            why = (str(e).splitlines() or [""])[0]
            raise InputError(
                "data.chat_template",
                True,
                f"the tokenizer's template cannot be applied to {place} ({type(e).__name__}: {why})",
                "mend the template, or set data.chat_template=false",
            ) from e
        return tuple(encoded["input_ids"])

    def _check_arguments(self, arguments: Mapping[str, object]) -> None:
        """Raises InputError for a name that the template does not read, or that is the tokenizer's own."""
        for name, value in arguments.items():
            field = f"data.template_arguments.{name}"
            if name in inspect.signature(self._tokenizer.apply_chat_template).parameters:
                raise InputError(field, value, "is set by the project, not by the template's user", "leave it out")
            if not re.search(rf"\b{re.escape(name)}\b", str(self._tokenizer.chat_template)):
                raise InputError(
                    field, value, "is no argument of the tokenizer's chat template", "leave it out, or mend its name"
                )

    def between(
        self, chat: Sequence[Message], new: Sequence[Message], last_token: int, data: config.Data
    ) -> tuple[int, ...]:
        """The tokens that stand between a sampled turn that ends with `last_token` and the next one: what the template
        writes around `new`, messages behind it. Raises ValueError, in words, if it does not write them so."""
        mark = "<|what was sampled|>"
        turns = [*map(dict, chat), {"role": "assistant", "content": mark}, *map(dict, new)]
        try:
            text: str = self._tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, tokenize=False, **self._of_template(data)
            )
        except Exception as e:  # a template may compute what it likes
            raise ValueError(f"the chat template cannot be applied to {new!r:.200} ({e})") from None
        _, found, behind = text.partition(mark)
        if not found:
            raise ValueError("the chat template does not write an assistant's message as it is")
        if last_token in self.stop_token_ids:
            behind = behind.removeprefix(self._tokenizer.decode([last_token], skip_special_tokens=False))
        token_ids = self.encode_plain(behind)
        if self._tokenizer.decode(token_ids, skip_special_tokens=False) != behind:
            raise ValueError(f"the tokenizer does not give {behind!r:.200} back")
        return token_ids

    def _of_template(self, data: config.Data) -> dict[str, Any]:
        return {**data.template_arguments, **({"tools": self.tools} if self.tools else {})}

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


def chat_of(
    problem: str, messages: Sequence[Message], data: config.Data, system_prompt: str | None
) -> tuple[Message, ...]:
    """The turns of a prompt: the row's own, or the problem as the user's; the prompt template is of the last one, and
    the system prompt goes before all."""
    turns = list(messages) or [{"role": "user", "content": problem}]
    turns[-1] = {**turns[-1], "content": data.prompt_template.replace("{problem}", turns[-1]["content"])}
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    return (*system, *turns)


def load(
    given: Given,
    data: config.Data,
    tokenizer: Tokenizer,
    name: str,
    *,
    overlong: str = "filter",
    is_graded: bool = True,
) -> tuple[list[Prompt], int]:
    """(prompts of all sources that `given`, the value of the field `name`, names: source by source in their order;
    number of over-long ones: left out, or with overlong="mask" cut and masked). `is_graded`: a verifier compares the
    answers, which must be texts. Raises InputError."""
    prompts, too_long = [], 0
    for found, num in _of_sources(given, data, tokenizer, name, overlong, is_graded):
        prompts += found
        too_long += num
    return prompts, too_long


def _of_sources(
    given: Given, data: config.Data, tokenizer: Tokenizer, name: str, overlong: str, is_graded: bool
) -> Iterator[tuple[list[Prompt], int]]:
    several = data_sources.several(given)
    for source in data_sources.resolved(given, data, name, is_graded):
        yield _load(source, data, tokenizer, source.name if several else "", overlong)


def _load(
    source: Resolved, data: config.Data, tokenizer: Tokenizer, name: str, overlong: str
) -> tuple[list[Prompt], int]:
    """Of one source, whose prompts bear the name `name`."""
    prompts, too_long = [], 0
    for i, row in enumerate(read_source(source)):
        place = f"{source.field}: {source.path}, prompt {i}"
        chat = chat_of(row.problem, row.messages, data, source.system_prompt)
        token_ids = tokenizer.encode_chat(chat, data, place)
        masked = len(token_ids) > data.max_prompt_tokens
        too_long += masked
        if not masked or overlong == "mask":
            token_ids = token_ids[: data.max_prompt_tokens]
            turns = chat if data.chat_template else ()
            prompts.append(
                Prompt(
                    i,
                    row.problem,
                    row.answer,
                    token_ids,
                    masked=masked,
                    row=row.columns,
                    messages=turns,
                    gold=row.gold,
                    source=name,
                )
            )
    if len({p.token_ids for p in prompts}) == 1 < len({p.problem for p in prompts}):
        field = "data.chat_template" if data.chat_template else "data.max_prompt_tokens"
        raise InputError(
            field, getattr(data, field[5:]), "makes the same tokens of every problem", "see that the problem is in them"
        )
    if all(p.masked for p in prompts):
        raise InputError(
            source.field,
            source.path,
            f"holds no prompt of at most {data.max_prompt_tokens} tokens",
            "raise data.max_prompt_tokens, or check the file",
        )
    return prompts, too_long


def digest(prompts: Sequence[Prompt], weights: Sequence[float] = (1.0,)) -> str:
    """Of all that a run learns from them: token ids and answers, in their order; of several sources the weights too."""
    sha = hashlib.sha256()
    for p in prompts:
        sha.update(json.dumps([p.token_ids, p.answer, p.masked]).encode())
    if len(weights) > 1:
        sizes = [len(each) for each in by_source(prompts).values()]
        sha.update(json.dumps([data_sources.shares(weights), sizes]).encode())
    return sha.hexdigest()[:16]


def by_source(prompts: Sequence[Prompt]) -> dict[str, list[Prompt]]:
    """The prompts of each source, by its name, in their order."""
    found: dict[str, list[Prompt]] = {}
    for p in prompts:
        found.setdefault(p.source, []).append(p)
    return found


def answers_by_source(cfg: config.Config, field: str, prompts: Sequence[Prompt]) -> dict[str, list[str]]:
    """The right answers of the prompts of `field`, data.train or eval.data, by source: data.train, or data.train[1]."""
    there = data_sources.of(cfg, field)
    return {s.field: [p.answer for p in prompts if len(there) == 1 or p.source == s.name] for s in there}


def load_evaluation(cfg: config.Config, tokenizer: Tokenizer) -> tuple[list[Prompt], int]:
    """(the prompts of eval.data, over-long ones left out, the first eval.max_prompts of each source; how many were left
    out up to the last of each). Raises InputError."""
    assert cfg.eval.data is not None
    prompts, num_left_out = [], 0
    for found, num in _of_sources(
        cfg.eval.data, cfg.data, tokenizer, "eval.data", "filter", bool(cfg.reward.verifiers)
    ):
        kept = found[: cfg.eval.max_prompts]
        prompts += kept
        # An id is the position in the source.
        num_left_out += num if len(kept) == len(found) else kept[-1].id + 1 - len(kept)
    return prompts, num_left_out


class Stream:
    """Endless prompts: a position in them is all the state there is.

    Each source is shuffled anew each epoch of its own. `weights`, one a source, say which source stands where
    (mixture.py). `skip`: of the order, the prompts that former stages took: a run goes on where they stopped.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, *, skip: int = 0, weights: Sequence[float] = (1.0,)):
        """`prompts`: source by source, in the order of the weights."""
        of_each = by_source(prompts)
        self.sources = list(of_each)  # their names
        self._sources, self._seed, self._skip = list(of_each.values()), seed, skip
        self._mixture = Mixture(weights)
        assert len(self._sources) == len(weights)
        self._orders: dict[tuple[int, int], list[int]] = {}  # by source and epoch: those last asked for

    def at(self, position: int) -> Prompt:
        source, cursor = self._mixture.at(self._skip + position)
        epoch, index = divmod(cursor, len(self._sources[source]))
        return self._sources[source][self._order(source, epoch)[index]]

    def has_other_than(self, ids: Mapping[str, Collection[int]]) -> bool:
        """Whether some prompt that something can be learnt from is not among these, by its source's name."""
        return any(not p.masked and p.id not in ids[p.source] for each in self._sources for p in each)

    def _order(self, source: int, epoch: int) -> list[int]:
        order = self._orders.get((source, epoch))
        if order is None:
            order = list(range(len(self._sources[source])))
            # Sources of equal length have orders of their own.
            random.Random(f"{self._seed}/{epoch}" + f"/{source}" * (source > 0)).shuffle(order)
            kept = {k: o for k, o in self._orders.items() if k[0] != source or k[1] >= epoch - 1}
            self._orders = kept | {(source, epoch): order}
        return order
