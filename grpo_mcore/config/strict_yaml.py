"""YAML as editors read it: the core schema of YAML 1.2, without what a configuration has no use for.

A plain scalar is null, true or false, a decimal number, or text: `1e-6` is a number; `yes`, `010`, `1:30`, `1_000` and
`2024-02-30` are text (PyYAML, which reads YAML 1.1, makes a boolean, 8, 90, 1000 and a traceback of them; 010 is 10
here). Keys are text. Refused: a key twice in one mapping, aliases, tags.
"""

import re
from typing import Any

import yaml

from grpo_mcore.config.config import InputError

NULL = re.compile(r"~|null|Null|NULL|")
BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
INT = re.compile(r"[-+]?[0-9]{1,400}")  # no number has more digits
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
BLANKS = re.compile("[\\x00-\\x09\\x0b-\\x1f\\x7f-\\xa0\\u2028\\u2029\\ufeff]")
UNTAGGED = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map")}  # what PyYAML calls what has no tag


def read(text: str, name: str, seen: str) -> Any:
    """The value of a document; `name` and `seen` are those of an error. Raises InputError."""
    try:
        node = yaml.compose(text, _Loader)
        return None if node is None else _value(node)
    except yaml.YAMLError as e:
        raise InputError(name, seen, f"is not valid YAML ({' '.join(str(e).split())})", "mend the line it names") from e
    except RecursionError:
        raise InputError(name, seen, "is nested too deeply", "no key is deeper than three levels") from None


def write(tree: dict[str, Any]) -> str:
    """What `read` reads as the same, and a reader of YAML 1.1 too."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def scalar(text: str) -> bool | int | float | str | None:
    """A plain scalar's value."""
    if NULL.fullmatch(text):
        return None
    if BOOL.fullmatch(text):
        return text.lower() == "true"
    if INT.fullmatch(text):
        return int(text)
    if FLOAT.fullmatch(text):
        return float(re.sub(r"\.(?=[iInN])", "", text))  # Python's inf has no point
    return text


class _Loader(yaml.BaseLoader):
    def compose_node(self, parent, index):  # type: ignore[no-untyped-def]
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise InputError(
                f"*{event.anchor}", _line(event), "is an alias, which is not read", "write its value out, or inherit it"
            )
        return super().compose_node(parent, index)


def _value(node: yaml.Node) -> Any:
    if node.tag not in UNTAGGED:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise InputError(tag, _line(node), "is a tag, which is not read", "leave it out: the key's type is known")
    if isinstance(node, yaml.ScalarNode):
        return scalar(node.value) if node.style is None else node.value
    if isinstance(node, yaml.SequenceNode):
        return [_value(item) for item in node.value]
    tree: dict[str, Any] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise InputError("key", _line(key), "is no name", "write `name: value`")
        if key.value in tree:
            raise InputError(key.value, "twice", "is written twice in one section", "keep one of them")
        tree[key.value] = _value(value)
    return tree


def _line(what: yaml.Node | yaml.Event) -> str:
    assert what.start_mark is not None
    return f"line {what.start_mark.line + 1}"


class _Dumper(yaml.SafeDumper):
    """Writes a list each time it occurs, and quotes what would be read as a number or as another blank."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if BLANKS.search(text) else None if scalar(text) is text else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
