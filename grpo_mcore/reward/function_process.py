"""The process that calls a reward function of the user's own: `python -m grpo_mcore.reward.function_process`.

What a function is called with depends on its style, which the names of its parameters tell (docs/tasks.md). It may
print, hang, eat memory or end the interpreter: that is the parent's to handle (killable.py).
"""

import asyncio
import contextlib
import importlib
import importlib.util
import inspect
import json
import math
import os
import reprlib
import sys
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_mcore.reward import channel, killable
from grpo_mcore.reward.functions import Case

Outcome = tuple[float | None, dict[str, Any]]  # (value; None: the reward does not apply, what else is said of it)
Reply = list[Outcome] | dict[str, str]  # one of each response, or {"error": words}
MOST_EXTRAS, MOST_CHARS = 32, 1000  # of what else is said of a response
NUM_AT_ONCE = 64  # calls of an async function
OF_VERL = {"data_source", "solution_str", "ground_truth", "extra_info"}
OF_TRL = {"prompts", "completions", "completion_ids"}  # and the data set's columns


class Unusable(Exception):
    """What the user got wrong about a function, in words."""


def load(path: str, *, classes: bool = False) -> Callable[..., Any]:
    """FILE.py:NAME or package.module:NAME: a function or, with `classes`, a class. Raises Unusable, and whatever the
    user's module raises."""
    where, _, name = path.rpartition(":")
    if where.endswith(".py") or os.sep in where:
        file = Path(where).resolve()
        if not file.is_file():
            raise Unusable(f"there is no file {where}")
        sys.path.insert(0, str(file.parent))  # for what it imports from beside it
        spec = importlib.util.spec_from_file_location(file.stem, file)
        if spec is None or spec.loader is None:
            raise Unusable(f"{where} is no Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[file.stem] = module
        spec.loader.exec_module(module)
    else:
        sys.path.insert(0, os.getcwd())
        try:
            module = importlib.import_module(where)
        except ModuleNotFoundError as e:
            if e.name and (where == e.name or where.startswith(e.name + ".")):
                raise Unusable(f"there is no module {e.name}") from None
            raise
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            names = [n for n in vars(module) if callable(getattr(module, n)) and not n.startswith("_")]
            raise Unusable(f"{where} has no {name}; it has {', '.join(names) or 'no function'}")
        found = getattr(found, part)
    if not callable(found) or (inspect.isclass(found) and not classes):
        raise Unusable(f"{name} is a {type(found).__name__}, and no function")
    function: Callable[..., Any] = found
    return function


def style_of(parameters: Mapping[str, inspect.Parameter], style: str) -> str:
    """`style`, or what the parameters tell of auto. Raises Unusable if they do not fit it."""
    names, takes_any = set(parameters), any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    if style == "auto":
        of_trl = names & OF_TRL
        style = "verl" if "solution_str" in names else "trl" if of_trl else "plain"
    its = f"its parameters are ({', '.join(parameters)})"
    if style == "verl":
        _refuse_others(parameters, OF_VERL, f"verl's compute_score is given {', '.join(sorted(OF_VERL))}")
    elif style == "trl":
        if not takes_any and not names & OF_TRL:
            raise Unusable(f"{its}: one must be {', '.join(sorted(OF_TRL))}")
    else:
        by_name = [p for p in parameters.values() if p.kind == p.KEYWORD_ONLY and p.default is p.empty]
        needed = [p for p in _positional(parameters) if p.default is p.empty]
        several = any(p.kind == p.VAR_POSITIONAL for p in parameters.values())
        if by_name or len(needed) > 3 or not (several or _positional(parameters)):
            raise Unusable(
                f"{its}: must be ({'texts' if style == 'group' else 'text'}, gold, row), or the first of them; or "
                "those of verl's compute_score, or of TRL's reward functions"
            )
    return style


def _positional(parameters: Mapping[str, inspect.Parameter]) -> list[inspect.Parameter]:
    return [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _refuse_others(parameters: Mapping[str, inspect.Parameter], given: Collection[str], words: str) -> None:
    """Raises Unusable for what has no default and is not given."""
    for p in parameters.values():
        is_named = p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        if is_named and p.default is p.empty and p.name not in given:
            raise Unusable(f"it needs {p.name!r}, and {words}")


class Caller:
    """Calls one function in its style. Raises Unusable if it cannot be called so."""

    def __init__(self, function: Callable[..., Any], style: str):
        self._function = function
        try:
            self._parameters = inspect.signature(function).parameters
        except (TypeError, ValueError):
            raise Unusable("its parameters cannot be read") from None
        self.style = style_of(self._parameters, style)
        self.is_async = any(map(inspect.iscoroutinefunction, (function, type(function).__call__)))
        kinds = [p.kind for p in self._parameters.values()]
        self._takes_any = inspect.Parameter.VAR_KEYWORD in kinds
        self._takes_all = inspect.Parameter.VAR_POSITIONAL in kinds

    def __call__(self, case: Case) -> Reply:
        said = Said(len(case.texts))
        try:
            return self._outcomes(self._call(case, said), said)
        except Exception as e:
            return {"error": words(e)}

    async def call_async(self, case: Case) -> Reply:
        said = Said(len(case.texts))
        try:
            return self._outcomes(await self._call(case, said), said)
        except Exception as e:
            return {"error": words(e)}

    def _call(self, case: Case, said: "Said") -> Any:
        if self.style == "verl":
            return self._by_name(_of_verl(case))
        if self.style == "trl":
            given = _of_trl(case)
            there = f"the row has {', '.join(case.row) or 'no column'}"
            _refuse_others(self._parameters, {*given, "log_extra", "log_metric"}, there)
            logs = {"log_extra": said.log_extra, "log_metric": said.log_metric}
            return self._by_name({**given, **{k: v for k, v in logs.items() if k in self._parameters}})
        arguments = (list(case.texts) if self.style == "group" else case.texts[0], case.answer, case.row)
        return self._function(*(arguments if self._takes_all else arguments[: len(_positional(self._parameters))]))

    def _by_name(self, given: Mapping[str, Any]) -> Any:
        return self._function(**{k: v for k, v in given.items() if self._takes_any or k in self._parameters})

    def _outcomes(self, result: Any, said: "Said") -> list[Outcome]:
        if self.style in ("verl", "plain"):
            extra = {}
            if isinstance(result, Mapping):
                if "score" not in result:
                    raise Unusable(f"it returned a dict without 'score': {_short(result)}")
                extra = {str(k): v for k, v in result.items() if k != "score"}
                result = result["score"]
            return [(number(result), {**_small(extra), **said.of(0)})]
        values = result.tolist() if hasattr(result, "tolist") else result
        count = len(said.extras)
        if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != count:
            shown = f"{len(values)} values" if isinstance(values, list) else _short(values)
            raise Unusable(f"it returned {shown} for {count} responses: must be a list of {count} numbers or None")
        return [(number(value), said.of(i)) for i, value in enumerate(values)]


class Said:
    """What a function says of responses besides its values, by TRL's log_extra and log_metric."""

    def __init__(self, count: int):
        self.extras: list[dict[str, Any]] = [{} for _ in range(count)]

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        for extra, value in zip(self.extras, values, strict=True):
            extra[str(column)] = value

    def log_metric(self, name: str, value: float) -> None:
        self.log_extra(name, [value] * len(self.extras))

    def of(self, index: int) -> dict[str, Any]:
        return _small(self.extras[index])


def _of_verl(case: Case) -> dict[str, Any]:
    return {
        "data_source": case.row.get("data_source", case.source),
        "solution_str": case.texts[0],
        "ground_truth": case.answer,
        "extra_info": case.row.get("extra_info") or {},
    }


def _of_trl(case: Case) -> dict[str, Any]:
    """Lists over the responses. Where the data set's prompts are messages, so are the completions."""
    count, is_chat = len(case.texts), not isinstance(case.problem, str)
    return {
        **{name: [value] * count for name, value in case.row.items() if name not in ("prompt", "completion")},
        "prompts": [case.problem] * count,
        "completions": [[{"role": "assistant", "content": t}] if is_chat else t for t in case.texts],
        "completion_ids": [list(ids) for ids in case.token_ids],
    }


def number(value: Any) -> float | None:
    """Raises Unusable if it is none."""
    if value is None:
        return None
    if not isinstance(value, (int, float)) and hasattr(value, "item"):
        with contextlib.suppress(ValueError, RuntimeError):  # of several numbers
            value = value.item()
    if not isinstance(value, (int, float)):
        raise Unusable(f"it returned {_short(value)} ({type(value).__name__}): must be a number or None")
    found = float(value)
    if not math.isfinite(found):
        raise Unusable(f"it returned {found}: must be a finite number or None")
    return found


def _small(extra: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON takes it, and not too much of it."""
    kept: dict[str, Any] = {}
    for name, value in list(extra.items())[:MOST_EXTRAS]:
        if not isinstance(value, (int, float, str)) and hasattr(value, "item"):
            with contextlib.suppress(ValueError, RuntimeError):
                value = value.item()
        is_number = isinstance(value, (int, float)) and math.isfinite(value)
        kept[str(name)[:MOST_CHARS]] = value if is_number or value is None else str(value)[:MOST_CHARS]
    return kept


def _short(value: object) -> str:
    return reprlib.repr(value)


def words(e: Exception, caller: str = __file__) -> str:
    """What the user is shown: of their own code the traceback, without the frames of `caller`, a file, and here."""
    if isinstance(e, Unusable):
        return str(e)
    frames = traceback.extract_tb(e.__traceback__)
    own = [frame for frame in frames if frame.filename not in (__file__, caller)]
    lines = ["Traceback (most recent call last):\n"] * bool(own)
    return "".join([*lines, *traceback.format_list(own), *traceback.format_exception_only(e)]).strip()


def _serve(path: str, style: str, limits: killable.Limits) -> None:
    to_parent = channel.Channel()
    try:
        caller = Caller(load(path), style)
    except Exception as e:
        to_parent.ready(error=words(e))
        return
    channel.limit_memory(limits.memory_bytes)
    if caller.is_async:
        to_parent.ready(style=caller.style, **{channel.AT_ONCE: NUM_AT_ONCE})
        asyncio.run(to_parent.serve_many(caller.call_async, limits.wall_s))
    else:
        to_parent.ready(style=caller.style)
        to_parent.serve(caller, limits.cpu_s)


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2], killable.Limits(*json.loads(sys.argv[3])))
