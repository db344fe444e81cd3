"""Predictions: sums over steps, and launch/plan.py simulate as a user calls it.

Not covered here: whether they come true (benchmarks/results/simulate.json).
"""

import dataclasses
import json
import re
import runpy

import pytest

from grpo_mcore import entry
from grpo_mcore.config import file as config_file
from grpo_mcore.config.config import InputError
from grpo_mcore.plan import cluster, predict
from grpo_mcore.plan.cluster import Cluster, Draw, EngineProfile, TrainerProfile
from grpo_mcore.plan.memory import Machine
from grpo_mcore.plan.predict import Question
from grpo_mcore.plan.simulate import Step
from tests.launch.test_launch import launch
from tests.plan.test_cluster import MODEL, ROOT, run_dir  # noqa: F401  a fixture

SMALL = (
    "engine.num_engines=2 engine.max_running_responses=4 "
    "rollout.prompts_per_step=2 rollout.group_size=2 batch.global_batch_size=4"
).split()
GPUS = (
    "device=auto engine.placement=disaggregated engine.kv_cache_bytes=null "
    "precision.params=bfloat16 engine.dtype=bfloat16"
).split()
LONG = ("rollout.max_response_tokens=8192", "batch.max_tokens_per_microbatch=16384")
FOUR = Machine("h100-80gb", 4)


def configuration(*overrides):
    return config_file.load(ROOT / "configs/quickstart.yaml", [*SMALL, f"model={MODEL}", *overrides])


@pytest.fixture
def profile(tmp_path):
    """An iteration takes 0.25 s, whatever runs."""

    def write(kv_cache_tokens: int | None) -> str:
        path = tmp_path / "profile.json"
        engine = EngineProfile(((1, 0.25),), kv_cache_tokens=kv_cache_tokens)
        path.write_text(json.dumps({"profile": dataclasses.asdict(engine)}))
        return str(path)

    return write


def test_a_summary_of_two_steps():
    first = Step(refit_s=1, rollout_s=3, train_s=6, busy_s=10, slots_s=20, failures=1)
    first.response_tokens, first.staleness, first.max_staleness = 100, 0.5, 1
    second = Step(refit_s=1, rollout_s=9, train_s=20, busy_s=30, slots_s=60, issued_again=4)
    second.response_tokens, second.staleness, second.max_staleness = 300, 1.5, 2
    p = predict.summary([first, second], num_engines=4, max_running_responses=2, responses_per_step=8)
    assert (p.step_s_mean, p.step_s_p50, p.step_s_p95) == (20, 20, 30)
    assert (p.refit_frac, p.rollout_frac, p.train_frac) == (2 / 40, 12 / 40, 26 / 40)
    assert (p.engines_busy_frac, p.slots_frac) == (40 / (40 * 4), 80 / (40 * 4 * 2))
    assert (p.response_tokens_mean, p.response_tokens_per_s) == (25, 10)
    assert (p.staleness_mean, p.staleness_max, p.failures, p.issued_again) == ((50 + 450) / 400, 2, 1, 4)


def test_what_a_run_measured_stands_beside_what_is_predicted_of_it(run_dir, profile):  # noqa: F811
    """Two engines take one group each; an iteration takes 0.25 s, whatever runs: step 2 waits for its longest response,
    22 tokens. The trainer's 4 s are its own."""
    ask = Question(like=str(run_dir), profile=profile(None))
    result = predict.answer(configuration(), ask)
    assert {name: (r["measured"], r["predicted"]) for name, r in result["measured"].items()} == {
        "refit_s": (2, 2),
        "rollout_s": (5, 5.5),
        "train_s": (4, pytest.approx(4)),
        "step_s": (11, pytest.approx(11.5)),
    }
    with pytest.raises(InputError, match="group_size"):
        predict.answer(configuration("rollout.group_size=4", "batch.global_batch_size=8"), ask)


def test_more_engines_and_staleness_shorten_a_step_and_failures_lengthen_it():
    def step_s(num_engines, **ask):
        step = "rollout.prompts_per_step=64 rollout.group_size=8 batch.global_batch_size=64 data.max_prompt_tokens=512"
        engines = ("engine.max_running_responses=64", f"engine.num_engines={num_engines}")
        cfg = configuration(*GPUS, *LONG, *step.split(), *engines)
        question = Question(machine=Machine("h100-80gb", num_engines + 1), steps=6, staleness=(0, 1), **ask)
        return {age: p["step_s_mean"] for age, p in predict.answer(cfg, question)["predicted"].items()}

    two, four = step_s(2), step_s(4)
    assert four[0] < two[0] and two[1] < two[0]
    assert step_s(2, failures_per_day=500, restart_s=120)[0] > two[0]


def test_with_a_gpu_a_run_gives_its_lengths_alone(run_dir):  # noqa: F811
    result = predict.answer(configuration(*GPUS), Question(like=str(run_dir), machine=Machine("h100-80gb", 3)))
    assert result["trainer"]["token_pair_s"] > 0
    assert result["predicted"][0]["response_tokens_mean"] == pytest.approx((20 + 21 + 21 + 22) / 4)


@pytest.mark.parametrize(
    "ask, words",
    [
        ({"machine": None}, "--gpu"),
        ({"mean_tokens": 5, "median_tokens": 9}, "--mean-tokens"),
        ({"profile": "nowhere.json"}, "--profile"),
        ({"like": "nowhere"}, "--like"),
        ({"staleness": (-1,)}, "max_staleness"),
        ({"failures_per_day": 1e9}, "failed 10 times. Remedy: lower --failures-per-day or --restart-s"),
    ],
)
def test_what_cannot_be_answered_is_said_in_one_line(ask, words):
    with pytest.raises(InputError, match=words):
        predict.answer(configuration(*GPUS), Question(**{"machine": FOUR} | ask))


@pytest.mark.parametrize(
    "option, text, words",
    [
        ("--gpu", "H101", "H101"),
        ("--gpu", "h100-80gb", "--num-gpus"),
        ("--steps", "many", "--steps = 'many': must be a whole number from 1 to"),
        ("--steps", "0", "--steps = '0': must be a whole number from 1 to"),
        ("--steps", "2.5", "--steps = '2.5': must be a whole number from 1 to"),
        ("--staleness", "0,a", "--staleness = 'a': must be a whole number from 0 to"),
        ("--flat-frac", "5", "--flat-frac = '5': must be a number from 0 to 1"),
        ("--median-tokens", "1e300", "--median-tokens = '1e300': must be a number from 1 to 1e"),
        ("--restart-s", "nan", "--restart-s = 'nan': must be a number of 0 or more"),
        ("--failures-per-day", "-1", "--failures-per-day = '-1': must be a number of 0 or more"),
    ],
)
def test_what_cannot_be_asked_is_said_in_one_line(option, text, words, monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["plan.py", "simulate", "--cfg", str(ROOT / "configs/quickstart.yaml"), option, text]
    )
    monkeypatch.setattr(entry, "run", lambda main: main())
    with pytest.raises(InputError, match=words):
        runpy.run_path(str(ROOT / "launch/plan.py"), run_name="__main__")


def test_an_engine_must_hold_a_sequence(profile):
    with pytest.raises(InputError, match="longest sequence, 48"):
        predict.answer(configuration(*GPUS), Question(machine=FOUR, profile=profile(47)))


def test_one_thousand_and_twenty_four_gpus_as_a_user_asks(tmp_path):
    ask = "--gpu h100-80gb --num-gpus 1024 --staleness 0,1 --steps 2 --failures-per-day 2000 --out out.json".split()
    keys = (*GPUS, *LONG, f"model={MODEL}", "engine.num_engines=896", "rollout.prompts_per_step=512")
    out = launch("plan.py", "simulate", "--cfg", ROOT / "configs/quickstart.yaml", *ask, *keys, cwd=tmp_path)
    result = json.loads((tmp_path / "out.json").read_text())
    assert set(result["predicted"]) == {"0", "1"}
    for name in ("step_s_mean", "engines_busy_frac", "staleness_max", "failures"):
        assert re.search(rf"^{name} .*\d", out, re.M), out
    assert [p["staleness_max"] for p in result["predicted"].values()] == [0, 1]
    phases = ("refit_frac", "rollout_frac", "train_frac")
    assert sum(p[phase] for p in result["predicted"].values() for phase in phases) == pytest.approx(2)
    assert result["predicted"]["0"]["failures"] > 0


def test_colocated_engines_are_not_said_to_sample_while_the_trainer_trains():
    cfg = configuration(*GPUS, "engine.placement=colocated", "engine.num_engines=4")
    predict.answer(cfg, Question(machine=FOUR, steps=1))
    with pytest.raises(InputError, match="placement"):
        predict.answer(cfg, Question(machine=FOUR, steps=1, staleness=(0, 1)))


def test_a_run_of_the_simulator_does_not_depend_on_chance():
    parts = Cluster(EngineProfile(((1, 0.1),)), TrainerProfile(token_s=0.01), cluster.Failures(20, 5))
    draw = lambda p: Draw(3, (5 + p % 7, 9))  # noqa: E731
    runs = [predict.run(configuration(), parts, draw, num_steps=5, skip=1) for _ in range(2)]
    assert runs[0] == runs[1] and len(runs[0]) == 5
