"""mean@k, pass@j, maj@k, error bars and paired comparisons: worked numbers, and enumeration of what a formula stands
for.

Not covered here: sampling and grading (test_evaluate.py, test_grader.py).
"""

import dataclasses
import math
import random
from itertools import combinations

import pytest

from grpo_mcore.evaluate.scores import Estimate, Problem, Result, compare


def problem(rewards, answers=None, *, id: int = 0) -> Problem:
    """`answers` None: each right sample says "r", and each wrong one something of its own."""
    answers = answers or ["r" if r else f"w{i}" for i, r in enumerate(rewards)]
    return Problem(id, "gold", tuple(map(float, rewards)), tuple(answers), (1,) * len(rewards), (False,) * len(rewards))


@pytest.mark.parametrize("n", range(1, 9))
def test_pass_at_j_is_the_share_of_subsets_of_j_samples_that_hold_a_right_one(n):
    for right in range(n + 1):
        rewards = [1] * right + [0] * (n - right)
        for j in range(1, n + 1):
            subsets = list(combinations(rewards, j))
            assert problem(rewards).pass_at(j) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


def test_pass_at_j_of_a_worked_example():
    # 4 samples, 1 right: 1 - C(3, 2) / C(4, 2) = 1 - 3/6; one wrong is enough for nothing: 1 - (3/4)^2 = 0.4375 would
    # be biased
    assert problem([0, 0, 1, 0]).pass_at(2) == 0.5
    # 64 samples, 1 right, numbers beyond float's integers
    assert problem([1] + [0] * 63).pass_at(32) == pytest.approx(0.5, rel=1e-12)


@pytest.mark.parametrize(
    "answers, rewards, expected",
    [
        (["5", "5", "6"], [1, 1, 0], 1.0),
        (["6", "6", "5"], [0, 0, 1], 0.0),  # right now and then, but outvoted
        (["5", "6"], [1, 0], 0.5),  # a tie
        (["6", "5", "7"], [0, 1, 0], 1 / 3),  # of three, whatever came first
        (["5", "7", "5", "7", "6"], [1, 0, 1, 0, 0], 0.5),  # of the two that lead
        ([None, None, "5"], [0, 0, 1], 1.0),  # no answer is no vote
        ([None, None], [0, 0], 0.0),
        (["5", "5.0", "6", "6"], [1, 1, 0, 0], 0.0),  # spelled differently they do not add up
        (["5", "5", "6"], [1, 0, 0], 1.0),  # one of two equal comparisons was stopped: it is right still
    ],
)
def test_the_majority_and_its_ties(answers, rewards, expected):
    assert problem(rewards, answers).majority == pytest.approx(expected)


def test_a_mean_with_its_error_bar_over_problems():
    # Means 1/2, 1, 0: 1/2. Deviations 0, 1/2, -1/2: variance (1/4 + 1/4) / 2 = 1/4 (Bessel), over 3 problems.
    e = Estimate.of([0.5, 1.0, 0.0])
    assert (e.value, e.standard_error) == (0.5, pytest.approx(math.sqrt(1 / 12), rel=1e-12))
    assert (e.low, e.high) == (0.0, 1.0)  # 0.5 +- 0.566, clipped
    # 100 problems, half solved: sqrt(25 / 99 / 100)
    e = Estimate.of([1.0, 0.0] * 50)
    assert e.standard_error == pytest.approx(math.sqrt(25 / 99 / 100))
    assert (e.low, e.high) == pytest.approx((0.5 - 1.96 * e.standard_error, 0.5 + 1.96 * e.standard_error))


def test_the_error_bar_is_over_problems_and_not_over_samples():
    # Two problems, one always solved and one never. Over problems sqrt((1/4 + 1/4) / 1 / 2) = 1/2, for any k;
    # over 2k independent samples it would be about 1 / sqrt(8k), 0.09 for k = 16.
    for k in (1, 4, 16):
        assert Result((problem([1] * k), problem([0] * k))).estimates[f"mean@{k}"].standard_error == 0.5


def test_a_single_problem_says_nothing_of_others():
    assert Estimate.of([0.25]) == Estimate(0.25, 0.0, 0.0, 1.0)


def test_the_interval_covers_the_true_mean_as_often_as_it_says():
    rng = random.Random(0)
    covered, trials = 0, 2000
    for _ in range(trials):
        # 40 problems of difficulties uniform in [0, 1], 4 samples each: the mean over all such problems is 1/2
        means = [sum(rng.random() < p for _ in range(4)) / 4 for p in (rng.random() for _ in range(40))]
        e = Estimate.of(means)
        covered += e.low <= 0.5 <= e.high
    # 0.95, less about 0.01 for normal instead of Student at 40; the count's own standard error is 0.005
    assert 0.92 < covered / trials < 0.965


def test_estimates_name_every_j():
    seen = Result((problem([1, 0, 0]), problem([1, 1, 1]))).estimates
    assert list(seen) == ["mean@3", "maj@3", "pass@1", "pass@2", "pass@3"]
    # pass@2 of 1 in 3: 1 - 1/3. maj@3 of one right and two wrong answers, all different: 1/3.
    assert {name: e.value for name, e in seen.items()} == pytest.approx(
        {"mean@3": 2 / 3, "maj@3": 2 / 3, "pass@1": 2 / 3, "pass@2": 5 / 6, "pass@3": 1.0}
    )


def test_a_paired_comparison_of_a_worked_example():
    mine = [problem([1, 1], id=0), problem([1, 0], id=1), problem([0, 0], id=2), problem([1, 0], id=3)]
    # another order, another k
    other = [problem([0, 0, 0, 1], id=3), problem([0, 0], id=2), problem([0, 0], id=1), problem([1, 1], id=0)]
    c = compare(mine, other)
    # differences 0, 1/2, 0, 1/4: mean 3/16; squares about it 9 + 25 + 9 + 1 = 44 over 256, over 3 and 4
    assert c.difference.value == 3 / 16
    assert c.difference.standard_error == pytest.approx(math.sqrt(44 / 256 / 12), rel=1e-12)
    assert (c.num_better, c.num_worse, c.num_problems) == (2, 0, 4)
    back = compare(other, mine)
    assert (back.difference.value, back.difference.low, back.difference.high) == pytest.approx(
        (-3 / 16, -c.difference.high, -c.difference.low)
    )


def test_pairing_removes_what_is_hard_for_both():
    rng = random.Random(1)
    levels = [rng.random() for _ in range(30)]
    mine, other = (
        [problem([rng.random() < p + gain for _ in range(64)], id=i) for i, p in enumerate(levels)]
        for gain in (0.05, 0.0)
    )
    c = compare(mine, other)
    # as if the problems were others
    alone = math.hypot(*(Result(tuple(x)).estimates["mean@64"].standard_error for x in (mine, other)))
    assert c.difference.standard_error < alone / 3
    assert c.difference.low <= 0.05 <= c.difference.high


def test_a_model_against_itself_differs_by_exactly_nothing():
    mine = [problem([1, 0], id=i) for i in range(5)]
    assert compare(mine, mine).difference == Estimate(0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    "other",
    [
        [problem([1], id=0)],
        [problem([1], id=0), problem([1], id=2)],
        [problem([1], id=0), Problem(1, "other", (1.0,), ("r",), (1,), (False,))],
    ],
)
def test_other_problems_are_refused(other):
    with pytest.raises(ValueError, match="not the same ones"):
        compare([problem([1], id=0), problem([1], id=1)], other)


def test_of_several_data_sets_each_has_its_scores_and_problems_of_one_id_are_two():
    def of(source: str, *rewards: int) -> Problem:
        return dataclasses.replace(problem(rewards), source=source)

    both = Result((of("a", 1, 1), of("b", 0, 1)), num_left_out=3)
    seen = both.metrics()
    assert (seen["eval/mean@2"], seen["eval/a/mean@2"], seen["eval/b/mean@2"]) == (0.75, 1.0, 0.5)
    assert (seen["eval/b/pass@2"], seen["eval/b/maj@2"]) == (1.0, 0.5) and "; b 0.500" in str(both)
    assert compare(both.problems, (of("b", 0, 0), of("a", 1, 1))).difference.value == 0.25
    with pytest.raises(ValueError, match="not the same ones"):
        compare(both.problems, (of("a", 1, 1), of("c", 0, 1)))
