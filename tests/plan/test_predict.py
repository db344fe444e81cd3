"""Predictions: sums over steps, and launch/plan.py simulate as a user calls it.

Not covered here: whether they come true (benchmarks/results/simulate.json).
"""

import json
import re

import pytest

from grpo_mcore.config import file as config_file
from grpo_mcore.config.config import InputError
from grpo_mcore.plan import cluster, predict
from grpo_mcore.plan.cluster import Cluster, Draw, EngineProfile, TrainerProfile
from grpo_mcore.plan.predict import Question
from grpo_mcore.plan.simulate import Step
from tests.launch.test_launch import launch
from tests.plan.test_cluster import MODEL, ROOT, run_dir  # noqa: F401  a fixture

SMALL = [
    "engine.num_engines=2",
    "engine.max_running_responses=4",
    "rollout.prompts_per_step=2",
    "rollout.group_size=2",
    "batch.global_batch_size=4",
]
GPUS = [
    "device=auto",
    "engine.placement=disaggregated",
    "engine.kv_cache_bytes=null",
    "precision.params=bfloat16",
    "engine.dtype=bfloat16",
]


def configuration(*overrides):
    return config_file.load(ROOT / "configs/quickstart.yaml", [*SMALL, f"model={MODEL}", *overrides])


def test_a_summary_of_two_steps():
    steps = [
        Step(
            refit_s=1,
            rollout_s=3,
            train_s=6,
            busy_s=10,
            slots_s=20,
            response_tokens=100,
            staleness=0.5,
            max_staleness=1,
            failures=1,
        ),
        Step(
            refit_s=1,
            rollout_s=9,
            train_s=20,
            busy_s=30,
            slots_s=60,
            response_tokens=300,
            staleness=1.5,
            max_staleness=2,
            issued_again=4,
        ),
    ]
    p = predict.summary(steps, num_engines=4, max_running_responses=2, responses_per_step=8)
    assert (p.step_s_mean, p.step_s_p50, p.step_s_p95) == (20, 20, 30)
    assert (p.refit_frac, p.rollout_frac, p.train_frac) == (2 / 40, 12 / 40, 26 / 40)
    assert (p.engines_busy_frac, p.slots_frac) == (40 / (40 * 4), 80 / (40 * 4 * 2))
    assert (p.response_tokens_mean, p.response_tokens_per_s) == (25, 10)
    assert (p.staleness_mean, p.staleness_max, p.failures, p.issued_again) == ((50 + 450) / 400, 2, 1, 4)


def test_what_a_run_measured_stands_beside_what_is_predicted_of_it(run_dir, tmp_path):  # noqa: F811
    """Two engines take one group each; an iteration takes 0.25 s, whatever runs: step 2 waits for its longest response,
    22 tokens. The trainer's 4 s are its own."""
    profile = tmp_path / "profile.json"
    profile.write_text(
        json.dumps(
            {
                "profile": {
                    "iteration_s": [[1, 0.25]],
                    "kv_token_s": 0,
                    "prefill_token_s": 0,
                    "response_s": 0,
                    "block_tokens": 0,
                    "kv_cache_tokens": None,
                }
            }
        )
    )
    result = predict.answer(configuration(), Question(like=str(run_dir), profile=str(profile)))
    assert {name: (r["measured"], r["predicted"]) for name, r in result["measured"].items()} == {
        "refit_s": (2, 2),
        "rollout_s": (5, 5.5),
        "train_s": (4, pytest.approx(4)),
        "step_s": (11, pytest.approx(11.5)),
    }
    with pytest.raises(InputError, match="group_size"):
        predict.answer(
            configuration("rollout.group_size=4", "batch.global_batch_size=8"),
            Question(like=str(run_dir), profile=str(profile)),
        )


def test_more_engines_and_staleness_shorten_a_step_and_failures_lengthen_it():
    def step_s(num_engines, **ask):
        cfg = configuration(
            *GPUS,
            "rollout.prompts_per_step=64",
            "rollout.group_size=8",
            "batch.global_batch_size=64",
            "data.max_prompt_tokens=512",
            "rollout.max_response_tokens=8192",
            "batch.max_tokens_per_microbatch=16384",
            "engine.max_running_responses=64",
            f"engine.num_engines={num_engines}",
        )
        question = Question(gpu="h100-80gb", num_gpus=str(num_engines + 1), steps="6", staleness="0,1", **ask)
        return {age: p["step_s_mean"] for age, p in predict.answer(cfg, question)["predicted"].items()}

    two, four = step_s(2), step_s(4)
    assert four[0] < two[0] and two[1] < two[0]
    assert step_s(2, failures_per_day="500", restart_s="120")[0] > two[0]


def test_with_a_gpu_a_run_gives_its_lengths_alone(run_dir):  # noqa: F811
    result = predict.answer(configuration(*GPUS), Question(like=str(run_dir), gpu="h100-80gb", num_gpus="3"))
    assert result["trainer"]["token_pair_s"] > 0 and result["predicted"][0]["response_tokens_mean"] == pytest.approx(
        (20 + 21 + 21 + 22) / 4
    )


@pytest.mark.parametrize(
    "ask, words",
    [
        ({"gpu": None}, "--gpu"),
        ({"gpu": "H101"}, "H101"),
        ({"num_gpus": None}, "--num-gpus"),
        ({"steps": "many"}, "--steps"),
        ({"staleness": "a"}, "--staleness"),
        ({"mean_tokens": "5", "median_tokens": "9"}, "--mean-tokens"),
        ({"profile": "nowhere.json"}, "--profile"),
        ({"like": "nowhere"}, "--like"),
        ({"failures_per_day": "-1"}, "--failures-per-day"),
        ({"staleness": "-1"}, "max_staleness"),
    ],
)
def test_what_cannot_be_answered_is_said_in_one_line(ask, words):
    with pytest.raises(InputError, match=words):
        predict.answer(configuration(*GPUS), Question(**{"gpu": "h100-80gb", "num_gpus": "4"} | ask))


def test_an_engine_must_hold_a_sequence(tmp_path):
    profile = tmp_path / "profile.json"
    profile.write_text(
        json.dumps(
            {
                "profile": {
                    "iteration_s": [[1, 0.25]],
                    "kv_token_s": 0,
                    "prefill_token_s": 0,
                    "response_s": 0,
                    "block_tokens": 0,
                    "kv_cache_tokens": 47,
                }
            }
        )
    )
    with pytest.raises(InputError, match="longest sequence, 48"):
        predict.answer(configuration(*GPUS), Question(gpu="h100-80gb", num_gpus="4", profile=str(profile)))


def test_one_thousand_and_twenty_four_gpus_as_a_user_asks(tmp_path):
    out = launch(
        "plan.py",
        "simulate",
        "--cfg",
        ROOT / "configs/quickstart.yaml",
        "--gpu",
        "h100-80gb",
        "--num-gpus",
        "1024",
        "--staleness",
        "0,1",
        "--steps",
        "2",
        "--failures-per-day",
        "2000",
        "--out",
        "out.json",
        *GPUS,
        f"model={MODEL}",
        "engine.num_engines=896",
        "rollout.prompts_per_step=512",
        "rollout.max_response_tokens=8192",
        "batch.max_tokens_per_microbatch=16384",
        cwd=tmp_path,
    )
    result = json.loads((tmp_path / "out.json").read_text())
    assert set(result["predicted"]) == {"0", "1"}
    for name in ("step_s_mean", "engines_busy_frac", "staleness_max", "failures"):
        assert re.search(rf"^{name} .*\d", out, re.M), out
    assert [p["staleness_max"] for p in result["predicted"].values()] == [0, 1]
    assert sum(
        p["refit_frac"] + p["rollout_frac"] + p["train_frac"] for p in result["predicted"].values()
    ) == pytest.approx(2)
    assert result["predicted"]["0"]["failures"] > 0


def test_colocated_engines_are_not_said_to_sample_while_the_trainer_trains():
    cfg = configuration(*GPUS, "engine.placement=colocated", "engine.num_engines=4")
    predict.answer(cfg, Question(gpu="h100-80gb", num_gpus="4", steps="1"))
    with pytest.raises(InputError, match="placement"):
        predict.answer(cfg, Question(gpu="h100-80gb", num_gpus="4", steps="1", staleness="0,1"))


def test_a_run_of_the_simulator_does_not_depend_on_chance():
    cfg = configuration()
    runs = [
        predict.run(
            cfg,
            Cluster(EngineProfile(((1, 0.1),)), TrainerProfile(token_s=0.01), cluster.Failures(20, 5)),
            lambda p: Draw(3, (5 + p % 7, 9)),
            num_steps=5,
            skip=1,
        )
        for _ in range(2)
    ]
    assert runs[0] == runs[1] and len(runs[0]) == 5
