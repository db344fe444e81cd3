"""mean@k, pass@k and their error bar: worked numbers.

Not covered here: sampling and grading of held-out prompts, which need engines.
"""

import math

import pytest

from grpo_mcore.evaluate import Result


def test_worked_numbers():
    # Problem means 1/2, 1, 0: mean 1/2. Deviations 0, 1/2, -1/2: variance (1/4 + 1/4) / 2 = 1/4 (Bessel), over 3 problems.
    r = Result.of([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]], 0.25)
    assert (r.k, r.num_problems, r.mean_at_k, r.truncated_frac) == (2, 3, 0.5, 0.25)
    assert r.pass_at_k == 2 / 3
    assert r.standard_error == pytest.approx(math.sqrt(1 / 12), rel=1e-12)


def test_the_error_bar_is_over_problems_and_not_over_samples():
    # Two problems, one always solved and one never. Over problems sqrt((1/4 + 1/4) / 1 / 2) = 1/2, for any k;
    # over 2k independent samples it would be about 1 / sqrt(8k), 0.09 for k = 16.
    for k in (1, 4, 16):
        assert Result.of([[1.0] * k, [0.0] * k], 0.0).standard_error == 0.5


def test_pass_at_k_counts_a_problem_once_however_often_it_is_solved():
    r = Result.of([[0.0, 0.0, 0.0, 1.0], [0.0] * 4, [1.0] * 4, [0.0] * 4], 0.0)
    assert r.pass_at_k == 0.5
    assert r.mean_at_k == 5 / 16


def test_at_k_1_pass_and_mean_are_the_same():
    r = Result.of([[1.0], [0.0], [1.0], [1.0]], 0.0)
    assert r.pass_at_k == r.mean_at_k == 0.75


def test_a_single_problem_has_no_error_bar():
    r = Result.of([[1.0, 0.0, 0.0, 0.0]], 0.0)
    assert (r.mean_at_k, r.pass_at_k, r.standard_error) == (0.25, 1.0, 0.0)


def test_metrics_carry_k_in_their_names():
    assert Result.of([[1.0, 0.0, 0.0, 0.0]] * 2, 0.5).metrics() == {
        "eval/mean@4": 0.25, "eval/pass@4": 1.0, "eval/standard_error": 0.0, "eval/truncated_frac": 0.5}
