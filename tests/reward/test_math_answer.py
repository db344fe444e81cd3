r"""Extracting, spelling and comparing answers. Expected values are worked by hand; none is what the code happened to
print.

Not covered: comparisons that do not end (test_grader.py, where they can be killed). What is equal is test_pairs.py's.
"""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from grpo_mcore.reward.math_answer import MAX_BOX_CHARS, extract_boxed, is_equal_as_text, normalise

EXTRACTED = [
    (r"The answer is \boxed{42}.", "42"),
    (r"\boxed{1} then \boxed{99}", "99"),  # the last, not the set {1, 99}
    (r"<think>maybe \boxed{7}</think> so \boxed{8}", "8"),
    (r"<think>maybe \boxed{7}</think> so 8", None),  # a box in the thinking does not count
    (r"maybe \boxed{7}</think> so \boxed{8}</think>", "8"),  # only the first </think> matters
    (r"maybe \boxed{7}</think> so \boxed{8}</think> ha", "8"),
    (r"<think> I had \boxed{7} when the length limit struck", "7"),  # no </think>: the whole text
    (r"\boxed{\frac{3}{4}}", r"\frac{3}{4}"),
    (r"\boxed{1} and \boxed{2", "1"),  # the last one that is balanced
    (r"\boxed{1 and \boxed{2}", "2"),
    (r"\boxed{\boxed{5}+1}", r"\boxed{5}+1"),  # of nested ones the outer closes last
    (r"\boxed {5}", "5"),
    (r"\\boxed{5}", "5"),  # as in a prompt that says \\boxed{}
    (r"}}} \boxed{ 5 } }}}", "5"),
    (r"\boxed{\{1,2\}}", r"\{1,2\}"),
    (r"\boxed{\{1,2)}", r"\{1,2)"),  # an escaped brace does not group
    (r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    (r"\boxed{}", None),
    (r"\boxed{ }", None),
    (r"\boxed 5", None),
    ("boxed{5}", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "box"), EXTRACTED)
def test_the_last_balanced_box_after_the_first_think_is_extracted(text, box):
    assert extract_boxed(text) == box


def test_a_box_that_is_too_long_is_refused_and_no_earlier_one_stands_in():
    assert extract_boxed(rf"\boxed{{{'1' * MAX_BOX_CHARS}}}") == "1" * MAX_BOX_CHARS
    assert extract_boxed(rf"\boxed{{5}} \boxed{{{'1' * (MAX_BOX_CHARS + 1)}}}") is None


@pytest.mark.parametrize(
    "unit", ["{", "}", r"\boxed{", r"\boxed{}", r"\boxed", "\\", r"\boxed    ", "</think>boxed", r"{\{"]
)
def test_extraction_takes_linear_time_on_megabytes_of_anything(unit):
    text = "boxed" + unit * (1_000_000 // len(unit))
    start = time.process_time()
    assert extract_boxed(text) is None
    # At most a million tokens at well under a microsecond each; a quadratic scan would take 1e12 steps.
    assert time.process_time() - start < 4


NORMALISED = [
    (" 5 ", "5"),
    ("$5$", "5"),
    ("$$5$$", "5"),
    (r"\(5\)", "5"),
    (r"\[ 5 \]", "5"),  # delimiters around the whole
    (r"$\boxed{a=170}$", "a=170"),
    ("{5}", "5"),
    (r"\text{5}", "5"),
    (r"\mathbf{2340}", "2340"),
    (r"\text{(B)}", "(B)"),
    ("$x>1$ or $x<0$", "x>1, x<0"),  # delimiters inside
    (r"4 \text{ or } 0", "4, 0"),
    (r"6, 8\text{, and }10", "6, 8, 10"),
    ("1 and 4", "1, 4"),
    ("5.", "5"),
    ("5,", "5"),
    ("5;", "5"),
    (r"\(\frac{1}{99}\).", r"\frac{1}{99}"),
    ("0.5", "0.5"),
    ("025", "25"),
    ("000", "0"),
    ("-07", "-7"),
    ("-0", "0"),
    ("+5", "5"),  # AIME's zero-padded integers
    ("0.50", "0.50"),
    ("05:54", "05:54"),  # ... and nothing but integers
    ("1,000", "1000"),
    ("1 000", "1000"),
    (r"1\,000", "1000"),
    ("1{,}008{,}016", "1008016"),
    (r"1,\!000", "1000"),
    ("12,345.5", "12345.5"),
    (r"100,000\pi", r"100000\pi"),
    (r"\frac{1}{10,500}", r"\frac{1}{10500}"),
    ("(100,101)", "(100, 101)"),
    (r"\{100,200\}", r"\{100, 200\}"),
    ("1,2,300", "1, 2, 300"),  # lists stay lists
    ("100, 200", "100, 200"),
    ("(995^2,994^2)", "(995^2, 994^2)"),
    ("12,34", "12, 34"),
    (r"\dfrac{1}{2}", r"\frac{1}{2}"),
    (r"\tfrac 12", r"\frac 12"),
    (r"\frac {7} {9}", r"\frac{7}{9}"),
    (r"\left( 2, \frac{5 \pi}{3} \right)", r"(2, \frac{5\pi}{3})"),
    (r"8 \sqrt {3}", r"8\sqrt{3}"),
    (r"\pi r", r"\pi r"),
    ("x + 3", "x+3"),
    (r"5 \; x", "5x"),
    (r"\displaystyle 5", "5"),
    (r"\$ 54.60", "54.60"),
    (r"\$23{,}000", "23000"),
    (r"5 \text{ dollars}", "5"),  # currency
    (r"90^\circ", "90"),
    (r"90^{\circ}", "90"),
    ("90°", "90"),
    ("90 degrees", "90"),
    (r"90\text{ degrees}", "90"),
    (r"10^\circ, 50^\circ", "10, 50"),
    (r"\sin 30^\circ", r"\sin 30^\circ"),  # the sine of 30 is another number
    ("12.5%", r"12.5\%"),
    (r"12.5 \%", r"12.5\%"),
    ("12.5 percent", r"12.5\%"),
    (r"12.5 \text{ percent}", r"12.5\%"),
    (r"35 \mathrm{~cm}", "35"),
    (r"2400 \mbox{ cm}^2", "2400"),
    (r"24\text{ in}^{3}", "24"),
    ("50 cm", "50"),
    (r"164 \pi \mbox{ square feet}", r"164\pi"),
    (r"\frac{4}{3} \mathrm{~m} / \mathrm{s}", r"\frac{4}{3}"),
    (r"480 + 480\sqrt{3}\text{ feet}", r"480+480\sqrt{3}"),
    (r"12 \text{ apples}", "12"),
    ("12 apples", "12"),
    ("3 L", "3"),
    ("2s", "2s"),
    ("10t", "10t"),
    ("5m", "5m"),
    (r"x \text{ is odd}", "x is odd"),  # products and prose are no units
    (r"11^{\text{th}}", "11"),
    ("11th", "11"),
    ("1 1/2", r"1\frac{1}{2}"),
    (r"1 \frac{1}{2}", r"1\frac{1}{2}"),
    ("11/2", "11/2"),  # mixed numbers
    ("12431_7", "12431_{7}"),
    ("32_{(8)}", "32_{8}"),
    ("(x_1, x_2)", "(x_{1}, x_{2})"),
    ("\u22125", "-5"),
    ("\u20131", "-1"),
    ("\uff081\uff0c2\uff09", "(1, 2)"),
    ("5\u00a0000", "5000"),
    ("2π", r"2\pi"),
    (r"\begin{pmatrix} 1 & 200 \\ -3 & 100 \end{pmatrix}", r"\begin{pmatrix}1&200\\-3&100\end{pmatrix}"),
]


@pytest.mark.parametrize(("answer", "spelling"), NORMALISED)
def test_answers_that_mean_the_same_get_one_spelling(answer, spelling):
    assert normalise(answer) == spelling
    assert normalise(spelling) == spelling


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("5", "5.", True),
        ("5", "6", False),
        ("9" * 5000, "9" * 4999 + "8", False),
        ("12431_8", "12431_7", False),
        ("5 cm", r"5 \text{ m}", False),
        ("7=5", "5", False),
        ("x=5", "5", True),
        ("9^{9^{9^9}}", "5", None),
        ("1/2", "0.5", True),
        ("1/2", "0.25", False),
        (r"\sqrt{16}", "4", None),
        ("listen", "silent", False),
        ("(1, 2)", "(1, 2, 3)", False),
        (r"(1, \sqrt{4})", "(1, 2)", None),
        (r"(3, \sqrt{4})", "(1, 2)", False),
    ],
)
def test_what_needs_no_algebra_is_decided_as_text(answer, gold, expected):
    assert is_equal_as_text(answer, gold) is expected


@pytest.mark.parametrize(
    "unit",
    [
        "{",
        "(",
        "[",
        "1,",
        "1 ",
        "=",
        "5=",
        r"\text{",
        r"\frac",
        "$",
        r"\boxed{",
        "1,000",
        r"\text{a}",
        "5 cm ",
        r"\\",
        "%",
        "^",
        "_1",
        r"\left(",
        "and ",
        "x<",
        r"\cup ",
        "(1,",
        r"\begin{matrix}",
        r"\pm ",
        "a ",
        "'",
        "x=(",
        ":",
        r"\{x|",
        "1.",
        r"\bar{1}",
        "percent",
        r"\le",
        "x_{1}",
    ],
)
def test_hostile_answers_are_read_at_once(unit):
    answer = (unit * MAX_BOX_CHARS)[:MAX_BOX_CHARS]
    start = time.process_time()
    assert is_equal_as_text(answer, "5") is not True
    is_equal_as_text(answer, answer[::-1])
    assert time.process_time() - start < 1  # milliseconds; seconds would be an exponential pattern


def test_importing_the_module_does_not_import_sympy():
    check = (
        "import sys, grpo_mcore.reward.math_answer; sys.exit('sympy' in sys.modules or 'math_verify' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", check], cwd=Path(__file__).parents[2], check=True, timeout=60)
