"""Reward functions of the user's own: the styles, what they may do wrong, and the limits. Real processes.

Not covered here: what becomes of the values (test_rewards.py).
"""

import time
from pathlib import Path

import pytest

from grpo_mcore.config.config import InputError, Reward, RewardFunction
from grpo_mcore.reward import functions
from grpo_mcore.reward.functions import Case, Function
from grpo_mcore.reward.grader import Part, Status
from tests.dist import ROOT

FILE = Path(__file__).with_name("functions_of_each_style.py")
# A wide clock: other processes may keep the cores busy.
CFG = Reward(num_processes=2, cpu_s=1.0, wall_s=30.0, memory_bytes=1 << 28)


def case(*texts: str, problem: object = "1+2", answer: object = "3", **columns: object) -> Case:
    row = {"problem": problem, "answer": answer, **columns}
    count = len(texts)
    return Case(problem, answer, row, "sums", texts, ((5, 6),) * count, (False,) * count)


def opened(name: str, style: str = "auto", cfg: Reward = CFG, **limits: float) -> Function:
    return Function(RewardFunction(f"{FILE}:{name}", style, **limits), cfg, "reward.functions[0]")


def parts_of(name: str, c: Case, style: str = "auto", cfg: Reward = CFG, **limits: float) -> list[Part]:
    with opened(name, style, cfg, **limits) as function:
        return list(function.ask(c))


@pytest.mark.parametrize(
    ("name", "style", "found"),
    [
        ("compute_score", "auto", "verl"),
        ("accuracy_reward", "auto", "trl"),
        ("plain", "auto", "plain"),
        ("plain_async", "auto", "plain"),
        ("of_group", "group", "group"),
    ],
)
def test_each_style_gives_the_same_values(name, style, found):
    with opened(name, style) as function:
        assert function.style == found
        parts = list(function.ask(case("it is 3", "it is 4", "", "-3 or 3")))
    assert [p.value for p in parts] == [1.0, 0.0, 0.0, 1.0]
    assert {(p.name, p.status) for p in parts} == {(name, Status.SCORED)}


def test_what_a_function_says_besides_its_value_is_kept():
    verl = parts_of("compute_score", case("3", "33"))
    assert [p.extra for p in verl] == [{"characters": n, "source": "sums"} for n in (1, 2)]
    assert parts_of("compute_score", case("3", data_source="gsm8k"))[0].extra["source"] == "gsm8k"
    assert parts_of("accuracy_reward", case("3", "4"))[0].extra == {"tokens": 2.0}


def test_none_is_no_value_and_no_failure():
    parts = parts_of("not_always", case("3", "4"))
    assert [(p.value, p.status) for p in parts] == [(2.0, Status.SCORED), (None, Status.NOT_APPLICABLE)]


def test_where_prompts_are_messages_so_are_the_completions(tmp_path):
    (tmp_path / "f.py").write_text(
        "def f(prompts, completions):\n"
        "    return [float(p[-1]['role'] == 'user' and c == [{'role': 'assistant', 'content': '3'}])\n"
        "            for p, c in zip(prompts, completions)]\n"
    )
    with Function(RewardFunction(f"{tmp_path}/f.py:f"), CFG, "f") as function:
        parts = list(function.ask(case("3", "4", problem=[{"role": "user", "content": "1+2"}])))
    assert [p.value for p in parts] == [1.0, 0.0]


def test_an_object_that_can_be_called_a_module_and_a_file_beside_it_are_found(tmp_path, monkeypatch):
    assert [p.value for p in parts_of("twice", case("3", "4"))] == [2.0, 0.0]
    package = tmp_path / "rewards_of_mine"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "short.py").write_text(
        "from rewards_of_mine import limits\ndef f(text): return limits.MOST - len(text)\n"
    )
    (package / "limits.py").write_text("MOST = 10\n")
    monkeypatch.chdir(tmp_path)
    with Function(RewardFunction("rewards_of_mine.short:f"), CFG, "f") as function:
        assert [p.value for p in function.ask(case("abc"))] == [7.0]
    (tmp_path / "beside.py").write_text("import neighbour\ndef f(text): return neighbour.ONE\n")
    (tmp_path / "neighbour.py").write_text("ONE = 1\n")
    monkeypatch.chdir("/")
    with Function(RewardFunction(f"{tmp_path}/beside.py:f"), CFG, "f") as function:
        assert [p.value for p in function.ask(case("abc"))] == [1.0]


@pytest.mark.parametrize(
    ("path", "style", "words"),
    [
        ("nowhere.py:f", "auto", "there is no file nowhere.py"),
        ("no.such.module:f", "auto", "there is no module no"),
        (f"{FILE}:accuracy", "auto", "has no accuracy; it has value_of, compute_score"),
        (f"{FILE}:Judge", "auto", "Judge is a type, and no function"),
        (f"{FILE}:FILE", "auto", "has no FILE"),
        (f"{FILE}:four", "auto", r"its parameters are \(text, gold, row, more\): must be \(text, gold, row\)"),
        (f"{FILE}:by_name_only", "auto", "must be"),
        (f"{FILE}:plain", "trl", "one must be completion_ids, completions, prompts"),
        (f"{FILE}:plain", "verl", "it needs 'text', and verl's compute_score is given"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_asked(path, style, words):
    with pytest.raises(InputError, match=rf"reward.functions\[2\].path = .*cannot be used: .*{words}"):
        Function(RewardFunction(path, style), CFG, "reward.functions[2]")


@pytest.mark.parametrize("body", ["1 / 0", "import no_such_package", "def f(:", "import os; os._exit(4)"])
def test_a_file_that_cannot_be_loaded_is_said_with_its_own_words(tmp_path, body):
    (tmp_path / "f.py").write_text(f"{body}\n")
    with pytest.raises(InputError, match="division by zero|no_such_package|invalid syntax|exit status 4"):
        Function(RewardFunction(f"{tmp_path}/f.py:f"), CFG, "reward.functions[0]")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("raises", "IndexError: list index out of range"),
        ("says_words", "it returned 'good' (str): must be a number or None"),
        ("not_finite", "it returned nan: must be a finite number or None"),
        ("too_few", "it returned 1 values for 2 responses: must be a list of 2 numbers or None"),
        ("unknown_column", "it needs 'difficulty', and the row has problem, answer"),
        ("eats", "MemoryError"),
        ("exits", "ended with exit status 3"),
    ],
)
def test_a_function_that_fails_is_shown_once_and_gives_no_value(name, words, capsys):
    parts = parts_of(name, case("3", "4"))
    assert [(p.value, p.status, p.detail) for p in parts] == [(None, Status.FAILED, words)] * 2
    said = capsys.readouterr().out
    assert said.count("warning: reward function") == 1 and words in said
    if name == "raises":
        assert f'File "{FILE}", line' in said and "function_process" not in said
    if name == "exits":
        assert "going" in said


def test_a_function_that_raises_on_some_responses_scores_the_others():
    assert [p.value for p in parts_of("raises", case("#### 3", "4", "#### 5"))] == [3.0, None, 5.0]


@pytest.mark.parametrize("name", ["prints", "reads_stdin"])
def test_what_a_function_prints_or_reads_does_not_meet_the_protocol(name):
    assert [p.value for p in parts_of(name, case("3", "4"))] == [1.0, 1.0]


def test_processor_time_and_clock_are_limited():
    for name, limit in (("spins", "cpu_s = 0.3 s of processor"), ("sleeps", "wall_s = 0.4 s of clock")):
        clock = 0.4 if name == "sleeps" else 30.0
        parts = parts_of(name, case("3"), cpu_s=0.3, wall_s=clock)
        assert [(p.value, p.status) for p in parts] == [(None, Status.TIMED_OUT)]
        assert parts[0].detail == f"killed after {limit} time"


def test_async_calls_run_at_the_same_time_and_one_that_hangs_costs_itself_alone():
    with opened("slow_async") as function:
        began = time.monotonic()
        assert [p.value for p in function.ask(case(*map(str, range(40))))] == [1.0] * 40
        assert time.monotonic() - began < 10  # one after the other they take 20 s
    parts = parts_of("hangs_async", case("1", "3", "5"), wall_s=1.0)
    assert [p.status for p in parts] == [Status.SCORED, Status.TIMED_OUT, Status.SCORED]
    assert parts[1].detail == "stopped after wall_s = 1 s of clock time"


def test_a_function_that_always_hangs_is_asked_once_in_a_while(monkeypatch):
    monkeypatch.setattr(functions, "STOPS_IN_A_ROW", 3)
    began = time.monotonic()
    with opened("sleeps", wall_s=1.0, cpu_s=1.0) as function:
        parts = list(function.ask(case(*map(str, range(200)))))
        assert [p.status for p in parts[:3]] == [Status.TIMED_OUT] * 3
        assert {p.detail for p in parts[5:]} == {functions.SUSPENDED}
        assert next(iter(function.ask(case("4")))).detail == functions.SUSPENDED
        function._ask_again_at = 0.0
        assert next(iter(function.ask(case("4")))).status == Status.TIMED_OUT
        assert next(iter(function.ask(case("4")))).detail == functions.SUSPENDED
    assert time.monotonic() - began < 60  # asked all, it would be 100 s


def test_what_is_withdrawn_is_not_asked():
    with opened("sleeps", wall_s=1.0, cpu_s=1.0) as function:
        asked = function.ask(case(*map(str, range(50))))
        assert next(iter(asked)).status == Status.TIMED_OUT
        asked.withdraw()
        began = time.monotonic()
    assert time.monotonic() - began < 10


EXAMPLES = ROOT / "examples"


@pytest.mark.parametrize(
    ("path", "style", "values"),
    [
        ("reward_of_verl.py:compute_score", "auto", [1.0, 0.0, 1.0]),
        ("rewards_of_trl.py:accuracy_reward", "auto", [1.0, 0.0, 1.0]),
        ("rewards_of_trl.py:brevity_reward", "auto", [-2.0, -2.0, -2.0]),
        ("rewards_of_your_own.py:in_order", "auto", [None, 1.0, 0.0]),
        ("rewards_of_your_own.py:judged", "auto", [0.05, 0.2, 0.15]),
        ("rewards_of_your_own.py:unlike_the_others", "group", [1.0, 1.0, 1.0]),
    ],
)
def test_the_examples_do_what_they_say(path, style, values):
    with Function(RewardFunction(f"{EXAMPLES}/{path}", style), CFG, "reward.functions[0]") as function:
        parts = list(function.ask(case("3", "1. a\n2. b", "1. a\n3.")))
    assert [p.value for p in parts] == pytest.approx(values)
