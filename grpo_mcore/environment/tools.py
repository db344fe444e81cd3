"""Tool calls in a response's text, as families of models write them. Pure.

hermes    <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>, any number of them: Qwen, Hermes
llama     {"name": "add", "parameters": {"a": 1}} as the whole text, perhaps behind <|python_tag|>: Llama 3.1 and later
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

HERMES = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
PYTHON_TAG = "<|python_tag|>"


@dataclass(frozen=True)
class Call:
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Malformed:
    """What was meant to be a call, and what the model is told of it."""

    error: str


def calls(text: str) -> list[Call | Malformed]:
    """In their order; none in a text that is an answer. Of thinking before them nothing counts.

    >>> calls('<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>')
    [Call(name='add', arguments={'a': 1})]
    """
    text = text.rpartition("</think>")[2]
    if "<tool_call>" in text:
        return [_call(body, "arguments") for body in HERMES.findall(text)]
    body = text.strip().removeprefix(PYTHON_TAG).strip()
    if text.strip().startswith(PYTHON_TAG) or (body.startswith("{") and '"name"' in body and '"parameters"' in body):
        return [_call(body, "parameters")]
    return []


def _call(body: str, arguments_key: str) -> Call | Malformed:
    try:
        tree = json.loads(body)
    except (ValueError, RecursionError) as e:
        return Malformed(f"error: the tool call is no valid JSON ({e})")
    if not isinstance(tree, dict) or not isinstance(tree.get("name"), str):
        return Malformed('error: a tool call is a JSON object with "name"')
    arguments = tree.get(arguments_key, {})
    if not isinstance(arguments, dict):
        return Malformed(f'error: the tool call\'s "{arguments_key}" must be a JSON object')
    return Call(tree["name"], arguments)
