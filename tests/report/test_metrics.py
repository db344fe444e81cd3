"""Metrics merge exactly however they are cut, and mismatch().

Not covered here: which metrics a step has, and where they go (test_sinks.py).
"""

import math
import random
from itertools import pairwise

import pytest
import torch

from grpo_mcore.config import config
from grpo_mcore.report import metrics
from grpo_mcore.report.metrics import EffectiveFraction, Max, Mean, MismatchError, Sum, check_mismatch, merge

LN2, LN4 = math.log(2), math.log(4)


def cut(rng: random.Random, values: list[int]) -> list[list[int]]:
    """Into parts of random sizes, none empty."""
    bounds = sorted(rng.sample(range(1, len(values)), rng.randint(0, len(values) - 1)))
    return [values[i:j] for i, j in pairwise([0, *bounds, len(values)])]


MAKE = {
    "mean": lambda v: Mean.of(torch.tensor(v)),
    "max": lambda v: Max.of(torch.tensor(v)),
    "sum": lambda v: Sum(float(sum(v))),
}


@pytest.mark.parametrize("kind, expected", [("mean", lambda v: sum(v) / len(v)), ("max", max), ("sum", sum)])
def test_the_merged_value_does_not_depend_on_how_the_parts_are_cut_or_ordered(kind, expected):
    rng = random.Random(0)
    for _ in range(100):
        values = [rng.randint(-50, 50) for _ in range(rng.randint(1, 20))]  # whole numbers: sums are exact
        parts = [MAKE[kind](part) for part in cut(rng, values)]
        rng.shuffle(parts)
        assert merge([{"m": part} for part in parts])["m"].value == expected(values)


@pytest.mark.parametrize("kind", MAKE)
def test_merge_is_associative(kind):
    a, b, c = (MAKE[kind](v) for v in ([3, 5], [-7], [2, 2, 11]))
    assert a.merge(b).merge(c) == a.merge(b.merge(c))


def test_a_mean_is_weighted_by_counts_and_not_a_mean_of_means():
    # (1 + 0 + 0 + 0) / 4; the mean of the two means would be 1 / 2
    assert Mean.of(torch.tensor([1.0])).merge(Mean.of(torch.zeros(3))).value == 0.25


def test_the_effective_fraction_of_weights_is_kishs():
    # (1 + 2 + 3)^2 / (3 x (1 + 4 + 9)) = 36 / 42; one with everything: 1/4; none: 0
    weights = torch.tensor([1.0, 2.0, 3.0])
    assert EffectiveFraction.of(weights).value == pytest.approx(6 / 7)
    assert EffectiveFraction.of(weights[:1]).merge(EffectiveFraction.of(weights[1:])) == EffectiveFraction.of(weights)
    assert EffectiveFraction.of(torch.ones(9)).value == 1.0
    assert EffectiveFraction.of(torch.tensor([0.0, 5.0, 0.0, 0.0])).value == 0.25
    assert EffectiveFraction.of(torch.zeros(3)).value == EffectiveFraction.of(torch.zeros(0)).value == 0.0


def test_importance_says_what_the_loss_takes():
    row = merge(
        [
            metrics.importance(torch.tensor([2.0, 0.5]), torch.tensor([True, False])),
            metrics.importance(torch.tensor([0.0, 0.5]), torch.tensor([True, False])),
        ]
    )
    # mean 3/4; two of four changed; 9 / (4 x 4.5) = 1/2
    assert {name: m.value for name, m in row.items()} == {
        "importance/weight_mean": 0.75,
        "importance/beyond_cap_frac": 0.5,
        "importance/effective_frac": 0.5,
    }


def test_a_maximum_with_a_nan_is_nan_in_any_order():
    nan, one = Max(float("nan")), Max(1.0)
    assert math.isnan(nan.merge(one).value) and math.isnan(one.merge(nan).value)


def test_a_rank_without_values_changes_nothing():
    none = Mean.of(torch.zeros(0))
    assert none.value == 0.0
    assert Mean(6.0, 3).merge(none) == Mean(6.0, 3)
    assert merge([{"a": Sum(1.0)}, {}, {"b": Max(2.0)}, {"a": Sum(3.0)}]) == {"a": Sum(4.0), "b": Max(2.0)}


def test_a_mean_of_many_float32_values_is_summed_in_float64():
    # In float32 2^24 + 1 = 2^24: the ones would be lost.
    assert Mean.of(torch.tensor([2.0**24, 1.0, 1.0, 1.0, 1.0])).total == 2.0**24 + 4


def mismatch(rollout: torch.Tensor, old: torch.Tensor, **cap: float) -> dict[str, metrics.Metric]:
    """At positions near the start of their sequences."""
    return metrics.mismatch(rollout, old, torch.arange(len(old)), **cap)


def test_mismatch_worked_numbers():
    rollout, old = torch.tensor([-1.0, -2.0, -1.0]), torch.tensor([-1.0, -2.0 + LN4, -1.0 - LN2])
    # d = old - rollout = 0, log 4, -log 2; importance weights 1, 4, 1/2
    m = {name: metric.value for name, metric in mismatch(rollout, old).items()}
    # Log-probs near 2 are held to 1.2e-7 in float32, and e^d = 4 multiplies that.
    assert m == pytest.approx(
        {
            "mismatch/logprob_abs_mean": (LN4 + LN2) / 3,
            "mismatch/logprob_abs_mean_from_0": (LN4 + LN2) / 3,
            "mismatch/logprob_abs_max": LN4,
            "mismatch/beyond_cap_frac": 1 / 3,  # only 4 > 2; 1/2 is a small weight, not a large one
            "mismatch/k3": ((4 - 1 - LN4) + (0.5 - 1 + LN2)) / 3,  # e^d - 1 - d
        },
        abs=1e-6,
    )
    assert mismatch(rollout, old, cap=4.5)["mismatch/beyond_cap_frac"].value == 0.0


def test_mismatch_of_equal_log_probs_is_exactly_zero():
    logprobs = torch.tensor([-0.1, -3.3, -40.0])
    assert {metric.value for metric in mismatch(logprobs, logprobs.clone()).values()} == {0.0}


def test_k3_of_a_mismatch_is_in_expectation_the_kl_from_engine_to_trainer():
    engine, trainer = torch.tensor([[0.7, 0.2, 0.1], [0.25, 0.25, 0.5]], dtype=torch.float64)
    # Each token as often as the engine samples it: 7, 2 and 1 times in 10.
    counts = torch.tensor([7, 2, 1])
    k3 = mismatch(engine.log().repeat_interleave(counts), trainer.log().repeat_interleave(counts))["mismatch/k3"].value
    assert k3 == pytest.approx((engine * (engine / trainer).log()).sum().item(), rel=1e-12)


def test_a_wild_mismatch_stays_finite():
    m = mismatch(torch.tensor([-1e4, 0.0]), torch.tensor([0.0, -1e4]))
    assert all(math.isfinite(metric.value) for metric in m.values())
    assert m["mismatch/logprob_abs_max"].value == 1e4
    assert m["mismatch/beyond_cap_frac"].value == 0.5


def test_a_mismatch_is_told_apart_by_position_in_the_sequence():
    position_R = torch.tensor([0, 255, 256, 1023, 1024, 16383, 16384, 90000])
    d = torch.tensor([0.1, 0.3, 0.2, 0.4, 0.5, 0.6, 0.7, 0.9])
    m = metrics.mismatch(torch.zeros(8), d, position_R)
    by_position = {
        name.removeprefix("mismatch/logprob_abs_mean_from_"): metric.value
        for name, metric in m.items()
        if "_from_" in name
    }
    assert by_position == pytest.approx({"0": 0.2, "256": 0.3, "1024": 0.5, "4096": 0.6, "16384": 0.8})


def test_a_mismatch_above_its_bounds_warns_and_stops(capsys):
    seen = {"mismatch/logprob_abs_mean": Mean(0.6, 3)}  # 0.2
    check_mismatch(seen, config.Mismatch(warn_above=0.2, stop_above=0.3), speaks=True)
    assert capsys.readouterr().out == ""
    check_mismatch(seen, config.Mismatch(warn_above=0.1, stop_above=0.3), speaks=True)
    assert "warning: mean |old - rollout| log-prob is 0.2" in capsys.readouterr().out
    check_mismatch(seen, config.Mismatch(warn_above=0.1), speaks=False)
    assert capsys.readouterr().out == ""
    for total in (0.6, math.nan):
        with pytest.raises(MismatchError, match="mismatch.stop_above = 0.15"):
            check_mismatch(
                {"mismatch/logprob_abs_mean": Mean(total, 3)}, config.Mismatch(stop_above=0.15), speaks=False
            )
