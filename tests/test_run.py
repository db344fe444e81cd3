"""In which order the parts of a run are made; when the stop rule ends it, in worked numbers, and what is said at the
end.
Not covered here: that the run then evaluates, saves and is finished (test_stages.py runs one).
"""

import json
import math
import time
import types

import pytest

from grpo_mcore import run
from grpo_mcore.config import config, file as config_file
from grpo_mcore.config.config import Stop
from grpo_mcore.data import arithmetic
from grpo_mcore.rollout.engines import EngineError, Engines
from grpo_mcore.run import stop_reason, summarize
from tests.dist import ROOT, spawn


def begin_in_turns(folder: str, cache: str) -> list[tuple[float, str]]:
    """What happens on this rank, and when, as a run begins whose engines take turns with its trainers, which here only
    the configuration says, since a CPU has nothing to lend; `cache` is the engines'."""
    keys = [
        f"model={folder}/model",
        f"run_dir={folder}/run",
        "warm_start=null",
        "engine.num_engines=1",
        "engine.offload_trainer=[]",
    ]
    cfg = config_file.load(ROOT / "configs/quickstart.yaml", [*keys, f"engine.kv_cache_bytes={cache}"])
    happened: list[tuple[float, str]] = []

    def happens(what: str) -> None:
        happened.append((time.monotonic(), what))  # one clock for all ranks

    class Policy(run.Policy):
        def __init__(self, *args, **kwargs):
            happens("a policy")
            super().__init__(*args, **kwargs)

    def wait(engines):
        honest_wait(engines)
        happens(f"{len(engines.ready)} engine")

    honest_wait, Engines.wait_until_ready = Engines.wait_until_ready, wait
    run.Policy, config.Engine.is_colocated = Policy, lambda self, device: True
    try:
        with run.open_run(cfg):
            happens("a run")
    except EngineError as e:
        happens(str(e))
    return happened


@pytest.mark.slow
def test_engines_on_the_trainers_gpus_have_started_before_there_is_a_policy(tmp_path):
    arithmetic.make_model(tmp_path / "model", seed=1)
    driver, other = spawn(begin_in_turns, 2, str(tmp_path), "67108864")
    assert [what for _, what in driver] == ["1 engine", "a policy", "1 engine", "a run"]
    assert [what for _, what in other] == ["a policy", "a run"]
    assert driver[0] < other[0], "the other ranks wait too"
    (((_, ended),),) = spawn(begin_in_turns, 1, str(tmp_path), "1")
    assert "engine start: engine 0 failed" in ended and "No available memory for the cache" in ended  # its own words


def rows(rewards: list[float], truncated: float | list[float] = 0.0) -> list[dict]:
    """Of steps 1, 2, ..."""
    fracs = truncated if isinstance(truncated, list) else [truncated] * len(rewards)
    return [
        {"step": i, "reward/mean": r, "rollout/truncated_frac": t}
        for i, (r, t) in enumerate(zip(rewards, fracs, strict=True), 1)
    ]


def test_without_a_rule_nothing_ends_a_run():
    assert stop_reason(Stop(), rows([0.5] * 100, 1.0), 100) is None


@pytest.mark.parametrize(
    "rewards, min_gain, ends",
    [
        ([0.0, 0.2, 0.2, 0.4], 0.1, False),  # means of 2: 0.1 and 0.3, a gain of 0.2
        ([0.0, 0.2, 0.1, 0.2], 0.1, True),  # 0.1 and 0.15: 0.05
        ([0.0, 0.5, 0.25, 0.75], 0.25, True),  # 0.25 and 0.5: exactly the least gain
        ([0.9, 0.9, 0.1, 0.1], 0.0, True),  # a loss
        ([9.0, 0.0, 0.2, 0.2, 0.4], 0.1, False),  # what was before the two windows does not count
        ([0.5, 0.5, 0.5], 0.1, False),  # too few
    ],
)
def test_a_plateau_is_a_mean_that_gained_too_little(rewards, min_gain, ends):
    why = stop_reason(Stop(plateau_window=2, plateau_min_gain=min_gain), rows(rewards), len(rewards))
    assert (why is not None) == ends
    if rewards == [0.0, 0.2, 0.1, 0.2]:
        assert why == "reward/mean went from 0.1 to 0.15, means of 2 values, and stop.plateau_min_gain is 0.1"


def test_a_nan_neither_ends_a_run_nor_keeps_it_going():
    nan, rule = math.nan, Stop(plateau_window=2)
    assert stop_reason(rule, rows([0.0, nan, 0.2, 0.4, 0.6]), 5) is None  # 0.1 and 0.5, as if it were not there
    assert stop_reason(rule, rows([0.5, 0.4, nan, 0.3, nan, 0.2]), 6) is not None
    assert stop_reason(rule, rows([nan] * 9), 9) is None


@pytest.mark.parametrize(
    "truncated, ends", [([0.1, 0.3, 0.4], True), ([0.9, 0.2, 0.4], False), ([0.3], False), ([0.3, 0.25], False)]
)
def test_truncation_ends_a_run_if_all_of_the_last_steps_are_above(truncated, ends):
    why = stop_reason(
        Stop(truncated_above=0.25, truncated_steps=2), rows([0.0] * len(truncated), truncated), len(truncated)
    )
    assert why == (
        "rollout/truncated_frac was 0.3 or more in 2 steps, and stop.truncated_above is 0.25" if ends else None
    )


def test_nothing_is_looked_for_before_after_steps():
    rule = Stop(truncated_above=0.0, truncated_steps=1, after_steps=3)
    assert [stop_reason(rule, rows([0.0] * n, 1.0), n) is not None for n in (1, 2, 3)] == [False, False, True]


def test_a_run_that_is_taken_up_again_is_judged_as_it_was():
    """Rows of later steps, which a killed run has left, and the evaluation of the last step, which comes after the
    judgement, do not count."""
    rule = Stop(plateau_window=1, plateau_metric="eval/mean@4")
    seen = [{"step": 0, "eval/mean@4": 0.2}, *rows([0.1, 0.1])]
    late = [{"step": 2, "eval/mean@4": 0.1}, {"step": 3, "reward/mean": 0.1, "rollout/truncated_frac": 0.0}]
    assert stop_reason(rule, seen, 2) is None and stop_reason(rule, [*seen, *late], 2) is None
    assert (
        stop_reason(rule, [*seen, *late], 3)
        == "eval/mean@4 went from 0.2 to 0.1, means of 1 values, and stop.plateau_min_gain is 0"
    )


def test_a_run_is_summarised_whatever_k_its_evaluations_had(tmp_path, capsys):
    rows = [{"step": 0, "eval/mean@2": 0.25}, {"step": 1, "loss": 1.0}, {"step": 2, "eval/mean@4": 0.75}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summarize(types.SimpleNamespace(cfg=types.SimpleNamespace(run_dir=str(tmp_path)), seconds=lambda: 7.0))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["eval_before"], summary["eval_after"]) == (0.25, 0.75)
    assert "held-out accuracy: 0.250 before, 0.750 after" in capsys.readouterr().out
