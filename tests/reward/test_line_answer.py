"""Answers on a line: what is read, how it is spelled, what is equal."""

import pytest

from grpo_mcore.reward import line_answer
from grpo_mcore.reward.verifiers import VERIFIERS


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So.\nAnswer: 34", "34"),
        ("Answer: 1\nwait\nANSWER :  \\frac{1}{2} ", r"\frac{1}{2}"),
        ("The final answer is 34", None),
        ("Answer:\n34", "34"),  # the space behind the colon may be a line's end
        ("Answer: 34" + "x" * 300, None),  # only the last 300 characters are read
    ],
)
def test_dapo_reads_the_line_of_the_last_answer(text, answer):
    assert line_answer.extract_dapo(text) == answer


@pytest.mark.parametrize(
    ("answer", "spelled"),
    [
        ("x = 5", "5"),
        (r"$\frac12$", r"\frac{1}{2}"),
        (r"\boxed{34}", "34"),
        ("34 degrees", "34"),
        (r"34^{\circ}", "34"),
        ("1,234", "1234"),
        ("1,2", "12"),  # as the original has it: digits and commas are one number
        (r"\text{(A)}", "(A)"),
        (r"\sqrt2", r"\sqrt{2}"),
        ("the value $12$ is it", "12"),
        (r"\$12.50", "12.50"),
        (r"2 \text{ cm}^2", "2"),
    ],
)
def test_dapo_spells_as_minerva(answer, spelled):
    assert line_answer.spell_dapo(answer) == spelled


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2 + 2 = 4\n#### 4", "4"),
        ("#### 3\n#### $1,200.", "1200"),
        ("#### -7.50 dollars", "-7.50"),
        ("it is 4", None),
        ("#### none", None),
    ],
)
def test_gsm8k_reads_the_number_after_the_last_hashes(text, answer):
    assert line_answer.extract_gsm8k(text) == answer


@pytest.mark.parametrize(
    ("answer", "gold", "equal"),
    [("4", "4.0", True), ("1200", "$1,200", True), ("4", "5", False), ("4", "four", False), ("-7.5", "-7.50", True)],
)
def test_gsm8k_compares_numbers(answer, gold, equal):
    assert line_answer.compare_gsm8k(answer, gold)[0] is equal


@pytest.mark.parametrize("name", VERIFIERS)
def test_every_verifier_reads_what_it_says_is_a_statement(name):
    verifier = VERIFIERS[name]
    assert verifier.extract(verifier.stated % "34") == "34"
    assert verifier.compare_text("34", "34")[0] is True
