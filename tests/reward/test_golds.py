r"""Which right answers of a data set can never be given, and what is said of them.

Not covered here: that a run asks (tests/test_run.py), and the verifiers (test_pairs.py).
"""

import re

import pytest

from grpo_mcore.config import config
from grpo_mcore.config.config import InputError
from grpo_mcore.reward import golds

SOLUTIONS = [f"There are {n} and {n} more.\n{n} + {n} = <<{n}+{n}={2 * n}>>{2 * n}.\n#### {2 * n}" for n in range(1, 9)]
VERIFIERS = ["math_verify", "boxed"]


def said(answers: list[str], **reward) -> str | None:
    return golds.check(answers, config.Reward(num_processes=1, **reward), "data.train", "d.jsonl")


@pytest.mark.parametrize("verifier", VERIFIERS)
@pytest.mark.parametrize("require_think", [False, True])
def test_nothing_is_said_of_answers_that_can_be_given(verifier, require_think):
    answers = ["72", r"\frac{3}{4}", "(1, 2)", r"x^2 + 1", r"\text{Tuesday}", "72"]
    assert said(answers, verifier=verifier, require_think=require_think) is None


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_whole_solutions_are_refused_with_the_pattern_that_finds_their_answers(verifier):
    with pytest.raises(InputError) as e:
        said(SOLUTIONS, verifier=verifier)
    assert f"8 of 8 answers can never be right, by reward.verifier={verifier}: " in str(e.value)
    assert r"#### 2'" in str(e.value) and r"Remedy: set data.answer_regex='####\s*(.+)'" in str(e.value)


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_a_share_is_said_with_examples_and_ends_nothing(verifier):
    words = said(["72", *SOLUTIONS[:2], "5", r"\frac{1}{"], verifier=verifier)
    assert words is not None and words.startswith("warning: data.train: 3 of 5 answers can never be right")
    assert "#### 4" in words and r"\\frac{1}{" in words and "or mend or remove these rows" in words
    words = said(
        ["72", *map(str, range(9)), SOLUTIONS[0]], verifier=verifier
    )  # of so few nothing is wrong with the column
    assert words is not None and "1 of 11 answers" in words and words.endswith("Remedy: mend or remove these rows")


@pytest.mark.parametrize("verifier", VERIFIERS)
@pytest.mark.parametrize(
    "answers, remedy",
    [
        (
            [
                "Tom has 3 apples and buys 4, so that he has 7 apples.",
                "He pays 2 times $5 a day, which makes $10 for all of them.",
            ],
            "name another",
        ),
        (["The answer is 5.", "Thus the answer is: 7"], r"set data.answer_regex='nswer(?: is:?|:)\s*(.+)'"),
        (["Answer: 5", "Answer: 7"], r"set data.answer_regex='nswer(?: is:?|:)\s*(.+)'"),
        (["<answer>5</answer>", "<answer>7</answer>"], "set data.answer_regex='<answer>(.+)</answer>'"),
    ],
)
def test_sentences_and_what_announces_an_answer_are_no_answers(verifier, answers, remedy):
    with pytest.raises(InputError) as e:
        said(answers, verifier=verifier)
    assert "2 of 2 answers can never be right" in str(e.value) and f"Remedy: {remedy}" in str(e.value)
    pattern = re.search("answer_regex='(.+)'", str(e.value))
    if pattern:  # by its own advice there is nothing more to say
        assert said([re.search(pattern[1], answer)[1] for answer in answers], verifier=verifier) is None


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_a_solution_with_a_box_is_its_answer(verifier):
    assert said([r"Half of it. The answer is $\boxed{\frac{1}{2}}$."], verifier=verifier) is None


def test_all_over_the_data_set_and_no_longer_than_it_may_take(monkeypatch):
    monkeypatch.setattr(golds, "SECONDS", 0.0)
    answers = [str(n) for n in range(10_000)] + [f"#### {n}" for n in range(10_000)]
    words = said(answers)
    assert words is not None
    never, looked = map(int, words.split("warning: data.train: ")[1].split(" answers")[0].split(" of "))
    assert looked <= golds.AT_ONCE and never == pytest.approx(looked / 2, abs=2)
