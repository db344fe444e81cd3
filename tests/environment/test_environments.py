"""Environments and agents in their processes, and tool calls in texts. The processes are real, the turns written here.

Not covered here: sessions over engines (test_runs.py), tokens (test_session.py).
"""

import json
import time
from pathlib import Path

import pytest

from grpo_mcore.config.config import Environment, InputError
from grpo_mcore.environment.environments import Environments
from grpo_mcore.environment.tools import Call, Malformed, calls
from grpo_mcore.reward.killable import Stopped
from tests.dist import ROOT

FILE = Path(__file__).with_name("environments_of_mine.py")
CHAT = [{"role": "user", "content": "2+3?"}]
ROW = {"problem": "2+3?", "answer": "5"}


def call(name: str, **arguments) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def played(environments: Environments, *turns: str, row=ROW) -> list:
    """What a session asks for, turn after turn, where the model says `turns`; the last is its end."""
    name, answer = environments.start(CHAT, row)
    said = [answer.result(30)]
    for text in turns:
        if not isinstance(said[-1], dict) or "generate" not in said[-1]:
            break
        said.append(environments.go_on(name, {"text": text, "truncated": False}).result(30))
    environments.end(name)
    return said


@pytest.fixture(scope="module")
def calculator():
    with Environments(Environment(f"{FILE}:Calculator", max_turns=3, num_processes=1, wall_s=5.0)) as environments:
        yield environments


def test_public_methods_are_tools_with_schemas(calculator):
    by_name = {tool["function"]["name"]: tool["function"] for tool in calculator.tools}
    assert sorted(by_name) == ["add", "divide", "fill", "wait"]
    assert by_name["add"]["description"] == "Adds two numbers."
    assert by_name["add"]["parameters"]["required"] == ["a", "b"]
    assert by_name["add"]["parameters"]["properties"]["a"] == {"type": "integer", "description": "The first number."}


def test_a_tool_is_called_its_answer_is_a_message_and_the_end_is_a_reward(calculator):
    first, second, end = played(calculator, call("add", a=2, b=3), "It is 5.")
    assert first == {"generate": CHAT}
    assert second["generate"][-2:] == [
        {"role": "assistant", "content": call("add", a=2, b=3)},
        {"role": "tool", "content": "5"},
    ]
    assert end == {"reward": 1.0, "extra": {"gold": "5"}}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (call("subtract", a=2, b=3), "error: there is no tool 'subtract'; there are add, divide, fill, wait"),
        (call("add", a=2), "error: add: missing a required argument: 'b'"),
        (call("fill", gigabytes=8), "error: MemoryError"),
        (call("divide", a=1, b=0), "error: ZeroDivisionError: division by zero"),
        ("<tool_call>{not json}</tool_call>", "error: the tool call is no valid JSON"),
        (call("get_reward"), "error: there is no tool 'get_reward'"),
        (call("__init__"), "error: there is no tool '__init__'"),
    ],
)
def test_a_call_that_fails_is_told_the_model(calculator, text, answer):
    said = played(calculator, text, "so")
    assert said[1]["generate"][-1]["content"].startswith(answer)
    assert said[2]["reward"] == 0.0


def test_several_calls_of_a_turn_are_answered_in_their_order_and_turns_are_bounded(calculator):
    both = call("add", a=1, b=1) + call("divide", a=1, b=2)
    said = played(calculator, both, both, both, both)
    assert [m["content"] for m in said[1]["generate"][-2:]] == ["2", "0.5"]
    assert len(said) == 4 and said[3]["reward"] == 2.0  # three turns, of which the last is the end


def test_one_that_hangs_ends_by_the_clock_and_others_go_on(calculator):
    name, answer = calculator.start(CHAT, ROW)
    answer.result(30)
    hangs = calculator.go_on(name, {"text": call("wait", seconds=60), "truncated": False})
    assert played(calculator, "5")[-1]["reward"] == 0.0
    stopped = hangs.result(30)
    assert isinstance(stopped, Stopped) and stopped.cause == "stopped after wall_s = 5 s of clock time"


def test_many_that_hang_do_not_keep_the_others_from_their_tools(calculator):
    hanging = []
    for _ in range(60):
        name, answer = calculator.start(CHAT, ROW)
        answer.result(30)
        hanging.append(calculator.go_on(name, {"text": call("wait", seconds=60), "truncated": False}))
    began = time.monotonic()
    assert played(calculator, call("add", a=2, b=3), "5")[-1]["reward"] == 1.0
    assert time.monotonic() - began < 5.0  # they are still under way
    assert all(isinstance(answer.result(30), Stopped) for answer in hanging)


def test_what_reset_returns_stands_behind_the_prompt():
    with Environments(Environment(f"{FILE}:Game", num_processes=1)) as environments:
        first, second, end = played(environments, call("open"), "done")
    assert first["generate"] == [{"role": "user", "content": "2+3?\nthe door is shut"}]
    assert second["generate"][-1] == {"role": "tool", "content": "it is open"} and end["reward"] is None


def test_an_agent_asks_for_turns_as_it_likes():
    with Environments(Environment(f"{FILE}:three_turns", num_processes=2)) as environments:
        assert environments.tools == []
        first, second, third, end = played(environments, "46", "8", "11")
    assert [len(m["generate"]) for m in (first, second, third)] == [1, 3, 5]
    assert third["generate"][-1] == {"role": "user", "content": "5+6="}
    assert end == {"reward": 0.05, "extra": {"first": "46"}}


def test_an_agent_that_raises_says_where():
    with Environments(Environment(f"{FILE}:raises", num_processes=1)) as environments:
        error = played(environments, "46")[-1]["error"]
    assert error.endswith("KeyError: 'no such thing'") and str(FILE) in error and "environment_process" not in error


def test_the_examples_play():
    examples = ROOT / "examples"
    with Environments(Environment(f"{examples}/environment_of_tools.py:Calculator", num_processes=1)) as environments:
        said = played(environments, call("multiply", a=6, b=7), "42")
    assert said[1]["generate"][-1]["content"] == "42" and said[-1] == {"reward": 1.0, "extra": {}}
    with Environments(Environment(f"{examples}/agent_that_checks_itself.py:run", num_processes=1)) as environments:
        assert played(environments, "6", "5")[-1] == {"reward": 1.0, "extra": {"changed": 1.0}}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Untyped", "Untyped.look has no type hint for where"),
        ("Silent", "Silent.look does not say what the model is to be told"),
        ("Empty", "Empty has no public method"),
        ("not_async", "neither an environment's class nor async def run"),
        ("nothing", "has no nothing"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_starts(name, words):
    with pytest.raises(InputError, match=f"environment.path = .*{words}"):
        Environments(Environment(f"{FILE}:{name}"))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It is 5.", []),
        (call("add", a=1), [Call("add", {"a": 1})]),
        ("<think>" + call("add", a=1) + "</think>5", []),
        ('<tool_call>{"name": "add"}', [Call("add", {})]),
        ('{"name": "add", "parameters": {"a": 1}}', [Call("add", {"a": 1})]),
        ('<|python_tag|>{"name": "add", "parameters": {}}', [Call("add", {})]),
        ("<tool_call>[1]</tool_call>", [Malformed('error: a tool call is a JSON object with "name"')]),
        (
            '<tool_call>{"name": "a", "arguments": 1}</tool_call>',
            [Malformed('error: the tool call\'s "arguments" must be a JSON object')],
        ),
        ('{"name": "Ann"}', []),
    ],
)
def test_calls_in_texts(text, found):
    assert calls(text) == found
