"""What config.py says, for editors and readers: its types, bounds, defaults, comments and docstrings as a JSON Schema
of the YAML files (draft 2020-12) and as a page of tables.

    python -m grpo_mcore.config.schema     writes configs/schema.json and docs/configuration.md

A description is the comment behind a field or, where that is long, the comment lines right above it; of a section, its
docstring. What the schema cannot say is left to the loader: rules between fields, and a whole number written as 3.0.
"""

import ast
import dataclasses
import functools
import inspect
import io
import json
import math
import re
import sys
import tokenize
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from grpo_mcore.config.bounds import (
    Bound,
    Contains,
    Hint,
    Matches,
    Section,
    alternatives,
    bounds_of,
    is_path,
    is_section,
    item_section,
    plain,
    without_null,
)
from grpo_mcore.config.config import Config

ROOT = Path(__file__).parents[2]
SCHEMA, PAGE = ROOT / "configs/schema.json", ROOT / "docs/configuration.md"

INHERIT = (
    "another file, a path from this file's folder: all of its keys (and of what it inherits) are taken, below this "
    "file's own; sections merge key by key, a value, a list or null replaces what was there"
)
INTRO = """# Configuration

<!-- Made by `python -m grpo_mcore.config.schema` of grpo_mcore/config/config.py: change that, not this page. -->

A run is one YAML file with the keys of this page; `key.sub=value` on the command line overrides one. An unknown key, a
wrong type, a number out of bounds or keys that do not fit each other are refused before anything starts, in one line
with a remedy. What is not given has its default; `--dry-run` prints the result. Names bear their units: `_tokens`,
`_s` (seconds), `_bytes`, `_frac` (of 1).

The key's type says how an override is read. A text is taken as it stands behind the first `=`, blanks, braces, quotes
and `#` included; a list is `key=[a, b]`, a section `key={sub: value}`, and `key=null` is null where a key may be. Where
a path or a list may stand, `[` begins a list. In a path `~` and environment variables (`$NAME`, `${NAME}`) stand for
what they name. Files are read as YAML 1.2, as editors read them: `1e-6` is a number, `yes` a text. Aliases and tags are
refused: `inherit` is there for that.

`configs/schema.json` says the same to editors: a first line `# yaml-language-server: $schema=PATH/schema.json`, as in
the files of `configs/`, brings completion and checks while typing.

A file of stages, for `launch/stages.py`, has keys of its own (`grpo_mcore/stages/stages.py`) and names files of
this kind.
"""


@dataclass(frozen=True)
class Key:
    """A field of a dataclass."""

    name: str
    hint: Hint  # its type with bounds, without null
    optional: bool  # it may be null
    section: type[Section] | None  # the dataclass that it holds
    item: type[Section] | None  # that of the items of its list
    default: object  # dataclasses.MISSING: none, or a section, whose keys have theirs
    required: bool
    what: str  # its comment, or the section's docstring


def keys(cls: type[Section]) -> list[Key]:
    """The fields of a section, in their order."""
    hints, said, found = typing.get_type_hints(cls, include_extras=True), comments(cls), []
    for f in dataclasses.fields(cls):
        hint, optional = without_null(hints[f.name])
        section = hint if is_section(hint) else None
        what = " ".join((inspect.getdoc(section) or "").split()) if section else said.get(f.name, "")
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        default = f.default
        if f.default_factory is not dataclasses.MISSING and section is None:
            default = f.default_factory()
        found.append(Key(f.name, hint, optional, section, item_section(hint), default, required, what))
    return found


@functools.cache
def comments(cls: type[Section]) -> dict[str, str]:
    """Field -> its comment, of those that have one."""
    source = inspect.getsource(cls)
    behind: dict[int, str] = {}  # by line
    alone: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            stands_alone = token.line[: token.start[1]].isspace()
            (alone if stands_alone else behind)[token.start[0]] = token.string.removeprefix("#").strip()
    found = {}
    for node in ast.iter_child_nodes(ast.parse(source).body[0]):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        start = node.lineno
        while start - 1 in alone:
            start -= 1
        lines = [alone[n] for n in range(start, node.lineno)]
        lines += [text for n, text in behind.items() if node.lineno <= n <= (node.end_lineno or node.lineno)]
        if lines:
            found[node.target.id] = " ".join(lines)
    return found


def _limits(hint: Hint) -> tuple[float, float, float, float]:
    """(above, at_least, at_most, below) of a type's bounds, the narrowest of each."""
    bounds = [b for b in bounds_of(hint) if isinstance(b, Bound)]
    above = max([b.above for b in bounds], default=-math.inf)
    at_least = max([b.at_least for b in bounds], default=-math.inf)
    at_most = min([b.at_most for b in bounds], default=math.inf)
    return above, at_least, at_most, min([b.below for b in bounds], default=math.inf)


def json_schema(cls: type[Section] = Config) -> dict[str, Any]:
    """The schema of a file of `cls`."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A run of grpo_mcore",
        "description": "Made by python -m grpo_mcore.config.schema of grpo_mcore/config/config.py.",
        **_object(cls),
        # What an heir leaves out may stand in the file that it inherits.
        "if": {"not": {"required": ["inherit"]}},
        "then": _required(cls),
    }
    schema["properties"] = {"inherit": {"description": INHERIT, "type": "string"}, **schema["properties"]}
    return schema


def _object(cls: type[Section]) -> dict[str, Any]:
    properties = {}
    for key in keys(cls):
        schema = _object(key.section) if key.section else _value(key.hint)
        if key.optional and "enum" in schema:
            schema["enum"].append(None)
        elif key.optional and "anyOf" in schema:
            schema["anyOf"].append({"type": "null"})
        elif key.optional:
            types = schema["type"]
            schema["type"] = [*(types if isinstance(types, list) else [types]), "null"]
        default = {} if key.default is dataclasses.MISSING else {"default": key.default}
        properties[key.name] = {"description": key.what, **schema, **default}
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _required(cls: type[Section]) -> dict[str, Any]:
    """What a file that inherits nothing must have, in it and in those of its sections that it has."""
    inner = {key.name: _required(key.section) for key in keys(cls) if key.section}
    inner = {name: schema for name, schema in inner.items() if schema}
    names = [key.name for key in keys(cls) if key.required]
    return ({"required": names} if names else {}) | ({"properties": inner} if inner else {})


def _value(hint: Hint) -> dict[str, Any]:
    """Of a type that is neither a section nor null."""
    if len(alternatives(hint)) > 1:
        return {"anyOf": [_value(part) for part in alternatives(hint)]}
    if section := item_section(hint):
        return {"type": "array", "items": {**_object(section), **_required(section)}}
    if typing.get_origin(hint) is tuple:
        return {"type": "array", "items": _value(typing.get_args(hint)[0])}
    if typing.get_origin(hint) is dict:
        return {"type": "object", "additionalProperties": {"type": ["boolean", "number", "string", "null"]}}
    if typing.get_origin(hint) is Literal:
        return {"enum": list(typing.get_args(hint))}
    kind, (above, at_least, at_most, below) = plain(hint), _limits(hint)
    schema: dict[str, Any] = {"type": {int: "integer", float: "number", bool: "boolean", str: "string"}[kind]}
    if at_least > above:
        schema["minimum"] = at_least
    elif above > -math.inf:
        schema["exclusiveMinimum"] = above
    elif kind is float:
        schema["minimum"] = -sys.float_info.max  # which infinity is not
    if at_most < below:
        schema["maximum"] = at_most
    elif below < math.inf:
        schema["exclusiveMaximum"] = below
    elif kind is float:
        schema["maximum"] = sys.float_info.max
    if kind is float:
        schema["not"] = {"type": "number", "minimum": 1, "maximum": 0}  # NaN alone is not out of any bounds
    for bound in bounds_of(hint):
        if isinstance(bound, Contains):
            schema["pattern"] = re.escape(bound.part)
        if isinstance(bound, Matches):
            schema["pattern"] = f"^(?:{bound.pattern})$"
    return schema


def page(cls: type[Section] = Config) -> str:
    """Markdown: a table a section, and one of what the sections' lists hold."""
    top = f"| `inherit` | text | | {INHERIT} |\n"
    parts = [INTRO, f"## Top of the file\n\n{inspect.getdoc(cls)}\n", _table(cls, top)]
    for key in keys(cls):
        if key.section:
            parts += [f"## {key.name}\n\n{_text(key.what)}\n", _table(key.section)]
    for item, names in _items(cls).items():
        also = "".join(f" Of `{name}[]` too." for name in names[1:])
        what = " ".join((inspect.getdoc(item) or "").split())
        parts += [f"## {names[0]}[]\n\n{_text(what)}{also}\n", _table(item)]
    return "\n".join(parts)


def _items(cls: type[Section]) -> dict[type[Section], list[str]]:
    """What the lists of sections hold, with the dotted keys of these lists."""
    found: dict[type[Section], list[str]] = {}
    for section in keys(cls):
        for key in keys(section.section) if section.section else ():
            if key.item:
                found.setdefault(key.item, []).append(f"{section.name}.{key.name}")
    return found


def _table(cls: type[Section], first: str = "") -> str:
    rows = "".join(
        f"| `{key.name}` | {_kind(key)} | {'required' if key.required else _code(key.default)} | {_text(key.what)} |\n"
        for key in keys(cls)
        if not key.section
    )
    return f"| key | value | default | what |\n|---|---|---|---|\n{first}{rows}"


def _kind(key: Key) -> str:
    """The values of a key, in words."""
    words = _words(key.hint)
    return words if not key.optional else f"{words}, `null`" if words.startswith("`") else f"{words}, or `null`"


def _words(hint: Hint, plural: str = "") -> str:
    """A type and its bounds."""
    if len(alternatives(hint)) > 1:
        return ", or ".join(_words(part, plural) for part in alternatives(hint))
    if item_section(hint):
        return "list of sections (below)"
    if typing.get_origin(hint) is dict:
        return "names with values"
    if typing.get_origin(hint) is tuple:
        return f"list of {_words(typing.get_args(hint)[0], plural='s')}"
    if typing.get_origin(hint) is Literal:
        return ", ".join(map(_code, typing.get_args(hint)))
    kind, (above, at_least, at_most, below) = plain(hint), _limits(hint)
    if kind is bool:
        return "`true`, `false`"
    words = ("path" if is_path(hint) else {int: "whole number", float: "number", str: "text"}[kind]) + plural
    words += "".join(f" with `{b.part}` in it" for b in bounds_of(hint) if isinstance(b, Contains))
    if at_least > above and at_most < below:
        return f"{words} {at_least:g} to {at_most}"
    words += f" {at_least:g} or more" if at_least > above else f" above {above:g}" if above > -math.inf else ""
    return words + (f", at most {at_most}" if at_most < below else f", below {below:g}" if below < math.inf else "")


def _code(value: object) -> str:
    """A value as YAML writes it."""
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value if isinstance(value, str) else json.dumps(value).replace('e-0', 'e-')}`"


def _text(what: str) -> str:
    """For a cell of a table."""
    return what.replace("|", r"\|").replace("<", r"\<")


def files() -> dict[Path, str]:
    """All that is made, by its path."""
    return {SCHEMA: json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n", PAGE: page()}


if __name__ == "__main__":
    for path, text in files().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        print(path.relative_to(ROOT))
