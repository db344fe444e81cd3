"""A Config from YAML and back.

Parsed once from a file plus dotted overrides; unknown keys are refused with a suggestion; the result is checked
(rules.py). The field's type says how a value is read: an override of a text is that text, character by character, of a
list or a section YAML's flow style; where either may stand, `[` begins a list. In a path `~` and environment variables
are expanded.

`inherit: other.yaml`, a path from the file's own folder, takes all keys of that file (and of what it inherits), below
the file's own: sections merge key by key; a value, a list or null replaces what was there.
"""

import dataclasses
import difflib
import math
import os
import re
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

from grpo_mcore.config import rules, strict_yaml
from grpo_mcore.config.bounds import Hint, Section, alternatives, is_path, is_section, plain, without_null
from grpo_mcore.config.config import Config, InputError

Tree = dict[str, Any]  # as YAML has it: nothing is known of the values
Kind = TypeVar("Kind", bound=Section)


def load(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Config from a YAML file and `key.sub=value` overrides. Raises InputError."""
    tree = _read(Path(path), ())
    for override in overrides:
        dotted, eq, text = override.partition("=")
        if not eq or not all(dotted.split(".")):
            raise InputError("override", override, "must read key.sub=value", "write it without spaces around '='")
        _section(tree, dotted)[dotted.rpartition(".")[2]] = _value_of_text(Config, dotted, text)
    config = _build(Config, tree, "")
    rules.check(config)
    return config


def _value_of_text(cls: type[Section], dotted: str, text: str) -> object:
    """The value of an override, as a file would have it. Raises InputError."""
    hint: Hint = cls
    for depth, key in enumerate(dotted.split(".")):
        section = without_null(hint)[0]
        prefix = ".".join(dotted.split(".")[:depth])
        if typing.get_origin(section) is dict and depth == dotted.count("."):  # a name of the user's own
            return strict_yaml.scalar(text)
        if not is_section(section):
            raise InputError("override", dotted, f"{prefix!r} is no section", "name a key of the configuration")
        _check_key(section, key, text, f"{prefix}." * bool(prefix))
        hint = typing.get_type_hints(section, include_extras=True)[key]
    kind, optional = without_null(hint)
    if optional and text == "null":
        return None
    if len(alternatives(kind)) > 1:
        return strict_yaml.read(text, dotted, text) if text.startswith("[") else text
    if plain(kind) is str or typing.get_origin(kind) is Literal:
        return text
    if is_section(kind) or typing.get_origin(kind) in (tuple, dict):
        return strict_yaml.read(text, dotted, text)
    return strict_yaml.scalar(text)


def read(cls: type[Kind], path: str | Path) -> Kind:
    """Another kind of file, whose keys are the dataclass `cls`, read as strictly. Raises InputError."""
    return _build(cls, _read(Path(path), ()), "")


def _read(path: Path, heirs: tuple[Path, ...]) -> Tree:
    """The mapping of a YAML file over what it inherits. `heirs`: the files that led here."""
    name, seen = ("inherit", f"{path} (in {heirs[-1]})") if heirs else ("--cfg", str(path))
    try:
        if not path.is_file():
            raise InputError(
                name, seen, "there is no such file", "give the path of a YAML file, such as configs/quickstart.yaml"
            )
        if path.resolve() in map(Path.resolve, heirs):
            raise InputError(name, seen, "inherits itself, by way of others or at once", "break the circle")
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as e:
        raise InputError(name, seen, f"cannot be read ({e.strerror})", "mend that, or name another file") from e
    except UnicodeDecodeError as e:
        raise InputError(name, seen, f"is not UTF-8 text ({e.reason} at byte {e.start})", "save it as UTF-8") from e
    tree = strict_yaml.read(text, name, seen)
    if not isinstance(tree, dict):
        raise InputError(name, seen, "must hold a mapping of keys", "see configs/quickstart.yaml")
    if "inherit" not in tree:
        return tree
    parent = tree.pop("inherit")
    if not isinstance(parent, str):
        raise InputError("inherit", parent, "must be one file's path", f"name one, from the folder of {path}")
    _check_representable(parent, "inherit")
    return _over(_read(path.parent / _expanded(parent, "inherit"), (*heirs, path)), tree)


def _over(below: Tree, above: Tree) -> Tree:
    """`above` over `below`, section by section."""
    merged = {
        key: _over(below[key], value) if isinstance(below.get(key), dict) and isinstance(value, dict) else value
        for key, value in above.items()
    }
    return {**below, **merged}


def _section(tree: Tree, dotted: str) -> Tree:
    """The mapping that holds the last key of `dotted`; made where it is missing."""
    node = tree
    for key in dotted.split(".")[:-1]:
        if node.get(key) is None:
            node[key] = {}
        node = node[key]
        if not isinstance(node, dict):
            raise InputError(
                "override", dotted, f"{key!r} is a value, not a section", "name a key of the configuration"
            )
    return node


def _check_key(cls: type[Section], key: str, value: object, prefix: str) -> None:
    fields = [f.name for f in dataclasses.fields(cls)]
    if key not in fields:
        near = difflib.get_close_matches(key, fields, n=1)
        remedy = f"did you mean {prefix}{near[0]}" if near else f"known keys here: {', '.join(fields)}"
        raise InputError(f"{prefix}{key}", value, "there is no such key", remedy)


def _build(cls: type[Kind], tree: Tree, prefix: str) -> Kind:
    """Dataclass `cls` from a mapping, recursively."""
    for key in tree:
        _check_key(cls, key, tree[key], prefix)
    hints = typing.get_type_hints(cls, include_extras=True)
    values = {}
    for f in dataclasses.fields(cls):
        if f.name in tree:
            values[f.name] = _coerce(hints[f.name], tree[f.name], prefix + f.name)
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise InputError(prefix + f.name, None, "is required", f"add `{f.name}:` to the configuration")
    return cls(**values)


def _coerce(hint: Hint, value: object, name: str) -> object:
    """`value` as the field's type, or InputError."""
    hint, optional = without_null(hint)
    if value is None and optional:
        return None
    hint = _alternative(hint, value, name)
    kind = plain(hint)
    if typing.get_origin(kind) is dict:
        return _scalars(value, name)
    if is_section(kind):
        if not isinstance(value, dict):
            raise InputError(name, value, "must be a section of keys", f"write its keys below `{name}:`")
        return _build(kind, value, name + ".")
    if typing.get_origin(kind) is tuple:
        return _items(typing.get_args(kind)[0], value, name)
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            words = ", ".join(map(str, typing.get_args(kind)))
            raise InputError(name, value, f"must be one of {words}", "choose one of them")
        return value
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < 1e300 else math.inf
    if type(value) is not kind:  # a bool is an int to Python
        raise InputError(name, value, f"must be of type {kind.__name__}", f"write a value of type {kind.__name__}")
    _check_representable(value, name)
    return _expanded(value, name) if is_path(hint) else value  # type: ignore[arg-type]


def _alternative(hint: Hint, value: object, name: str) -> Hint:
    """Of a text or a list, which `value` is to be; of another type that type."""
    if len(alternatives(hint)) == 1:
        return hint
    if not isinstance(value, (str, list)):
        raise InputError(
            name, value, "must be a text or a list of sections", "write a text, or `- key: value` below it"
        )
    is_list = [typing.get_origin(part) is tuple for part in alternatives(hint)]
    return alternatives(hint)[is_list.index(isinstance(value, list))]


def _scalars(value: object, name: str) -> dict[str, object]:
    """`value` as a mapping of the user's own names to texts, numbers, booleans or null."""
    if not isinstance(value, dict):
        raise InputError(name, value, "must be a mapping of names", f"write `name: value` below `{name}:`")
    for key, each in value.items():
        if isinstance(each, (dict, list)):
            raise InputError(
                f"{name}.{key}", each, "must be a text, a number, true, false or null", "write one of these"
            )
        _check_representable(key, name)
        _check_representable(each, f"{name}.{key}")
    return dict(value)


def _check_representable(value: object, name: str) -> None:
    """Raises InputError for a number or text that nothing could be done with."""
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(name, value, "must be a finite number", "write one")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise InputError(name, value, "must fit into 64 bits", "write a smaller number")
    if isinstance(value, str) and re.search("[\ud800-\udfff\0]", value):
        raise InputError(name, value, "holds what is no character", "write it as UTF-8 text")


def _expanded(path: str, name: str) -> str:
    """With `~` and environment variables replaced."""
    found = os.path.expandvars(os.path.expanduser(path))
    if unset := re.search(r"\$\w+|\$\{[^}]*\}", found):
        raise InputError(name, path, f"{unset.group()} is no environment variable", "set it, or write the path out")
    if found.startswith("~"):
        raise InputError(name, path, "there is no such user's home", "write the path out, or ./~ for a name with it")
    if not found.strip():
        raise InputError(name, path, "is empty", "name a path")
    return found


def _items(item: Hint, value: object, name: str) -> tuple[object, ...]:
    """`value` as a tuple of `item`, a type: of sections, names, some names or whole numbers."""
    if is_section(item):
        if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
            raise InputError(name, value, "must be a list of sections", f"write `- key: value` below `{name}:`")
        return tuple(_build(item, v, f"{name}[{i}].") for i, v in enumerate(value))
    choices = typing.get_args(item) if typing.get_origin(item) is Literal else ()
    kind = str if choices else plain(item)
    if not isinstance(value, list) or not all(type(v) is kind for v in value):
        words, example = ("names", "[one, two]") if kind is str else ("whole numbers", "[0, 1]")
        raise InputError(name, value, f"must be a list of {words}", f"write it as {example}")
    for v in value:
        if choices and v not in choices:
            raise InputError(name, v, f"must be of {', '.join(choices)}", "choose among them")
        _check_representable(v, name)
    return tuple(value)


def describe(config: Config, world_size: int) -> str:
    """The resolved configuration as YAML, then the derived sizes with their units."""
    p = config.parallel
    sizes = {
        "responses per step": f"{config.responses_per_step} responses ({config.rollout.prompts_per_step} prompts x "
        f"{config.rollout.group_size})",
        "responses per optimizer step": f"{config.batch.global_batch_size} responses (over all ranks)",
        "optimizer steps per step": f"{config.optimizer_steps_per_step} optimizer steps",
        "tokens per microbatch": f"at most {config.batch.max_tokens_per_microbatch} tokens (per data-parallel rank)",
        "longest sequence": f"{config.longest_tokens} tokens (prompt and response)",
        "optimizer steps of the run": f"{config.num_steps * config.optimizer_steps_per_step} optimizer steps "
        f"({config.num_steps} steps)",
        "ranks by axis": f"tp {p.tp} x cp {p.cp} x pp {p.pp} x dp {world_size // p.ranks_per_replica} = "
        f"{world_size} ranks; {config.engine.num_engines} engines",
    }
    width = max(map(len, sizes))
    return to_yaml(config) + "\n# derived\n" + "\n".join(f"# {k:{width}}  {v}" for k, v in sizes.items())


def to_yaml(config: Config) -> str:
    return strict_yaml.write(dataclasses.asdict(config))
