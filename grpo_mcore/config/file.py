"""A Config from YAML and back.

Parsed once from a file plus dotted overrides; unknown keys are refused with a suggestion; values are coerced by the
field's type (PyYAML reads `1e-6` as a string); the result is checked (rules.py).

`inherit: other.yaml`, a path from the file's own folder, takes all keys of that file (and of what it inherits), below
the file's own: sections merge key by key; a value, a list or null replaces what was there.
"""

import dataclasses
import difflib
import typing
from collections.abc import Hashable
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from grpo_mcore.config import rules
from grpo_mcore.config.bounds import Hint, Section, is_section, without_null
from grpo_mcore.config.config import Config, InputError

Tree = dict[str, Any]  # as YAML has it: nothing is known of the values
Kind = TypeVar("Kind", bound=Section)


class _Loader(yaml.SafeLoader):
    """A key written twice in one mapping is an error: YAML would let the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise InputError(str(key), "twice", "is written twice in one section", "keep one of them")
        return super().construct_mapping(node, deep)


def load(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Config from a YAML file and `key.sub=value` overrides (values in YAML). Raises InputError."""
    tree = _read(Path(path), ())
    for override in overrides:
        dotted, eq, text = override.partition("=")
        if not eq or not dotted:
            raise InputError("override", override, "must read key.sub=value", "write it without spaces around '='")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text  # a string with YAML's own characters in it
        _section(tree, dotted)[dotted.rpartition(".")[2]] = value
    config = _build(Config, tree, "")
    rules.check(config)
    return config


def read(cls: type[Kind], path: str | Path) -> Kind:
    """Another kind of file, whose keys are the dataclass `cls`, read as strictly. Raises InputError."""
    return _build(cls, _read(Path(path), ()), "")


def _read(path: Path, heirs: tuple[Path, ...]) -> Tree:
    """The mapping of a YAML file over what it inherits. `heirs`: the files that led here."""
    name, seen = ("inherit", f"{path} (in {heirs[-1]})") if heirs else ("--cfg", str(path))
    if not path.is_file():
        raise InputError(
            name, seen, "there is no such file", "give the path of a YAML file, such as configs/quickstart.yaml"
        )
    if path.resolve() in map(Path.resolve, heirs):
        raise InputError(name, seen, "inherits itself, by way of others or at once", "break the circle")
    try:
        tree = yaml.load(path.read_text(), _Loader)
    except yaml.YAMLError as e:
        raise InputError(name, seen, f"is not valid YAML ({' '.join(str(e).split())})", "mend the line it names") from e
    if not isinstance(tree, dict):
        raise InputError(name, seen, "must hold a mapping of keys", "see configs/quickstart.yaml")
    if "inherit" not in tree:
        return tree
    parent = tree.pop("inherit")
    if not isinstance(parent, str):
        raise InputError("inherit", parent, "must be one file's path", f"name one, from the folder of {path}")
    return _over(_read(path.parent / parent, (*heirs, path)), tree)


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


def _build(cls: type[Kind], tree: Tree, prefix: str) -> Kind:
    """Dataclass `cls` from a mapping, recursively."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in tree:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            remedy = f"did you mean {prefix}{near[0]}" if near else f"known keys here: {', '.join(fields)}"
            raise InputError(f"{prefix}{key}", tree[key], "there is no such key", remedy)
    hints = typing.get_type_hints(cls)
    values = {}
    for name, f in fields.items():
        if name in tree:
            values[name] = _coerce(hints[name], tree[name], prefix + name)
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise InputError(prefix + name, None, "is required", f"add `{name}:` to the configuration")
    return cls(**values)


def _coerce(hint: Hint, value: object, name: str) -> object:
    """`value` as the field's type, or InputError."""
    kind, optional = without_null(hint)
    if value is None and optional:
        return None
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
    wrong = InputError(name, value, f"must be of type {kind.__name__}", f"write a value of type {kind.__name__}")
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            raise wrong from None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise wrong
    return value


def _items(item: Hint, value: object, name: str) -> tuple[object, ...]:
    """`value` as a tuple of `item`, a type: of sections, names, some names or whole numbers."""
    if is_section(item):
        if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
            raise InputError(name, value, "must be a list of sections", f"write `- key: value` below `{name}:`")
        return tuple(_build(item, v, f"{name}[{i}].") for i, v in enumerate(value))
    choices = typing.get_args(item)  # of a Literal
    plain = str if choices else item
    if not isinstance(value, (list, tuple)) or not all(type(v) is plain for v in value):
        words, example = ("names", "[one, two]") if plain is str else ("whole numbers", "[0, 1]")
        raise InputError(name, value, f"must be a list of {words}", f"write it as {example}")
    for v in value:
        if choices and v not in choices:
            raise InputError(name, v, f"must be of {', '.join(choices)}", "choose among them")
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
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)
