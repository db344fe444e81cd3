"""Rewards of a group to advantages: worked numbers, and a float64 oracle of loops.

Not covered here: that rewards arrive in the order of the responses.
"""

import math
import random
import statistics

import pytest
import torch

from grpo_mcore.loss.advantage import group_advantages

EPS = 1e-6  # added to a std, and the std below which none is divided by


def advantages(rewards: list[float], baseline: str, normalize_by_std: bool) -> list[float]:
    return group_advantages(
        torch.tensor([rewards], dtype=torch.float64), baseline=baseline, normalize_by_std=normalize_by_std
    )[0].tolist()


def oracle(rewards: list[float], baseline: str, normalize_by_std: bool) -> list[float]:
    """One response at a time, from the definitions, in float64."""
    out = []
    for i, reward in enumerate(rewards):
        compared = rewards if baseline == "mean" else rewards[:i] + rewards[i + 1 :]
        advantage = reward - statistics.fmean(compared)
        std = statistics.stdev(compared) if len(compared) > 1 else 0.0
        out.append(advantage / (std + EPS) if normalize_by_std and std > EPS else advantage)
    return out


THIRD, ROOT3 = 1 / 3, math.sqrt(3)


@pytest.mark.parametrize(
    "rewards, baseline, normalize_by_std, expected",
    [
        # mean 1/4
        ([1, 0, 0, 0], "mean", False, [0.75, -0.25, -0.25, -0.25]),
        # squared deviations 9/16 + 3 x 1/16 = 3/4, over 3 (Bessel) = 1/4: std 1/2
        ([1, 0, 0, 0], "mean", True, [1.5, -0.5, -0.5, -0.5]),
        # mean 1/2; squared deviations 1/4 + 1/4, over 1 = 1/2: std 1/sqrt(2)
        ([1, 0], "mean", True, [math.sqrt(0.5), -math.sqrt(0.5)]),
        # the others' means: 0 for the first, 1/3 for the rest
        ([1, 0, 0, 0], "leave_one_out", False, [1, -THIRD, -THIRD, -THIRD]),
        # the first's others have std 0: left as it is. The rest's others are 1, 0, 0: (4/9 + 1/9 + 1/9) / 2 = 1/3: std
        # 1/sqrt(3)
        ([1, 0, 0, 0], "leave_one_out", True, [1, -1 / ROOT3, -1 / ROOT3, -1 / ROOT3]),
        # others 1 0 1 -> mean 2/3; 2 0 1 -> 1; 2 1 1 -> 4/3; 2 1 0 -> 1
        ([2, 1, 0, 1], "leave_one_out", False, [4 / 3, 0, -4 / 3, 0]),
        # stds of these others: sqrt(1/3), 1, sqrt(1/3), 1;   4/3 x sqrt(3) = 4/sqrt(3)
        ([2, 1, 0, 1], "leave_one_out", True, [4 / ROOT3, 0, -4 / ROOT3, 0]),
        # one other has no std: the plain difference
        ([1, 0], "leave_one_out", True, [1, -1]),
    ],
)
def test_worked_numbers(rewards, baseline, normalize_by_std, expected):
    # EPS beside a std of 0.5 or more moves a number by 2e-6 of itself; float32 adds 6e-8.
    assert advantages(rewards, baseline, normalize_by_std) == pytest.approx(expected, rel=2.5e-6, abs=1e-9)


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("normalize_by_std", [False, True])
@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_equal_rewards_give_advantages_of_exactly_zero(baseline, normalize_by_std, reward):
    assert advantages([reward] * 16, baseline, normalize_by_std) == [0.0] * 16


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_the_rounding_of_a_mean_is_not_blown_up_by_its_own_std(baseline):
    # The mean of three 0.1 is 0.10000000000000002 in float64: std 1.7e-17, and divided by it the advantages would be
    # about 1.
    assert advantages([0.1] * 3, baseline, True) == pytest.approx([0.0] * 3, abs=1e-12)


def test_where_the_others_agree_leave_one_out_is_not_normalised():
    # 0.7 - 0.2 of the odd one out: divided by (0 + EPS) it would be 500,000.
    first, *rest = advantages([0.7, 0.2, 0.2, 0.2, 0.2], "leave_one_out", True)
    assert first == pytest.approx(0.5, rel=1e-6)
    # 0.2 - 0.325 = -0.125; the others 0.7 and three 0.2 have std sqrt((0.375^2 + 3 x 0.125^2) / 3) = 0.25
    assert rest == pytest.approx([-0.5] * 4, rel=1e-5)  # EPS / 0.25 = 4e-6


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("normalize_by_std", [False, True])
@pytest.mark.parametrize("G", [2, 3, 8, 16])
def test_random_rewards_equal_the_loops_of_the_oracle(baseline, normalize_by_std, G):
    rng = random.Random(G)
    draws = [
        lambda: float(rng.random() < 0.3),
        rng.random,
        lambda: rng.gauss(0, 3),
        lambda: rng.choice([-1.0, 0.0, 0.25]),
    ]
    rewards_PG = [[draws[p % 4]() for _ in range(G)] for p in range(40)]
    ours = group_advantages(
        torch.tensor(rewards_PG, dtype=torch.float64), baseline=baseline, normalize_by_std=normalize_by_std
    )
    for row, rewards in zip(ours.tolist(), rewards_PG, strict=True):
        # float64 within, one rounding to float32 at the end
        assert row == pytest.approx(oracle(rewards, baseline, normalize_by_std), rel=2e-7, abs=1e-9)


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_the_order_of_responses_within_a_group_does_not_matter(baseline):
    rng = random.Random(0)
    rewards = [rng.choice([0.0, 0.5, 1.0, 2.0]) for _ in range(8)]
    order = rng.sample(range(8), 8)
    straight = advantages(rewards, baseline, True)
    # sums of float64 in another order, rounded to float32: at most the last bit
    assert advantages([rewards[i] for i in order], baseline, True) == pytest.approx(
        [straight[i] for i in order], rel=1.2e-7, abs=1e-12
    )


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_a_group_is_compared_with_itself_alone(baseline):
    rows = [[1.0, 0.0, 0.0], [5.0, 7.0, 9.0]]
    together = group_advantages(torch.tensor(rows), baseline=baseline, normalize_by_std=True)
    assert together.tolist() == [advantages(row, baseline, True) for row in rows]
