r"""Extracting, spelling and comparing answers. Expected values are worked by hand; none is what the code happened to
print.

Not covered: comparisons that do not end (test_grader.py, where they can be killed), and math-verify's own algebra.
"""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from grpo_mcore.reward.math_answer import MAX_BOX_CHARS, extract_boxed, is_equal, is_equal_as_text, normalise

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
    (r"5 \; x", "5 x"),
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
    (r"x \text{ is odd}", r"x\text{is odd}"),  # products and prose are no units
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


EQUAL = [
    ("5.", "5"),
    ("1 000", "1000"),
    ("90°", "90"),
    (r"12.5\%", "12.5"),
    ("1 1/2", r"\frac{3}{2}"),  # refused by math-verify
    (r"12.5\%", "0.125"),
    (r"50\%", "1/2"),
    (r"33\frac{1}{3}\%", r"33\frac13"),
    ("25", "025"),
    ("-1 1/2", "-1.5"),
    (r"\frac{1}{2}", "0.5"),
    (r"2\sqrt3", r"\sqrt{12}"),
    ("x+3", "3+x"),
    ("(x+1)^2", "x^2+2x+1"),
    ("3^8", "6561"),
    ("x=5", "5"),
    ("5", "x=5"),
    ("x = 10/2 = 5", "5"),
    ("2+3=5", "5"),
    (r"\text{Area} = 25\pi", r"25\pi"),
    ("y=x+3", "x+3"),
    ("0.56", r"0.56 = 56\%"),
    (r"56\%", r"0.56 = 56\%"),
    (r"\sum_{i=1}^{5}1", "5"),
    ("7, 5", r"5 \text{ or } 7"),
    ("(100, 101)", "(100,101)"),
    ("13", "[13]"),
    (r"5 \text{ cm}", "5"),
    ("5", r"5 \text{ cm}"),
    ("5cm", r"5 \mathrm{~cm}"),
    ("4 square feet", r"4 \text{ ft}^2"),
    ("5 hours", r"5 \text{ hrs}"),
    ("60 mi/h", r"60 \text{ miles per hour}"),
    ("8:34", r"8\!:\!34 \text{ p.m.}"),
    ("yes", r"\text{Yes}"),
    ("B", r"\text{(B)}"),
    ("12431", "12431_7"),
    ("12431_{7}", "12431_7"),
]
NOT_EQUAL = [
    ("7=5", "5"),
    ("[5]", "5"),
    (r"5 \text{ cm}", r"5 \text{ m}"),  # accepted by math-verify
    ("x=7=5", "5"),
    ("7=5=5", "5"),
    ("5=7", "5"),
    ("x=5", "y=5"),
    ("6=2+3", "5"),
    ("2", "2s"),
    ("3m", "3g"),
    ("10", "10t"),
    ("12431_8", "12431_7"),
    (r"5 \text{ ft}^2", r"5 \text{ ft}"),
    ("2:15 pm", "4:30 pm"),
    ("4:30 am", "4:30 pm"),
    ("0.5", r"0.5\%"),
    ("11/2", "1 1/2"),
    (r"\frac{1}{2}", r"1\frac{1}{2}"),
    ("100200", "100, 200"),
    ("(100, 101)", "100101"),
    ("100101", "(100,101)"),
    ("5, 6", "5"),
    (r"\pm 5", "5"),
    ("I think 5", "5"),
    ("7 or 5", "5"),
    (r"\text{odd}", r"\text{even}"),
    ("A", "B"),
    ("1/3", "0.333"),
    ("-5", "5"),
    ("", "5"),
    (".", "5"),
    ("$$", "5"),
    ("(1, 2)", "(2, 1)"),
    ("[1, 2]", "(1, 2)"),
    ("5" * 400 + "1", "5" * 400 + "2"),
]


@pytest.mark.parametrize(("answer", "gold"), EQUAL)
def test_equal_answers_are_equal(answer, gold):
    assert is_equal(answer, gold) is True


@pytest.mark.parametrize(("answer", "gold"), NOT_EQUAL)
def test_other_answers_are_not_equal(answer, gold):
    assert is_equal(answer, gold) is False


# (gold as data sets of competition problems write it, another way to write it, a near miss)
GOLDS = [
    (r"\frac{432}{11}", "432/11", r"\frac{432}{12}"),
    ("29", "+29", "28"),
    (r"-\sqrt{3}", r"-3^{1/2}", r"\sqrt{3}"),
    (r"\frac{56 \pi \sqrt{3}}{9}", r"\frac{56\sqrt{3}\pi}{9}", r"\frac{56\pi}{9}"),
    ("6a", r"6 \cdot a", "6"),
    (r"14\frac{14}{23}", r"\frac{336}{23}", r"\frac{14}{23}"),
    ("12, 15, 18", r"\{18, 15, 12\}", "12, 15, 19"),
    (r"10 - 5 \sqrt{2+\sqrt{2}}", r"5(2 - \sqrt{2+\sqrt{2}})", r"10 - 5\sqrt{2}"),
    ("4^9", "262144", "4^8"),
    (r"$\dfrac{10}{21}$", r"\frac{20}{42}", r"\frac{21}{10}"),
    (r"\left[ -1, \frac{1}{\sqrt{2}} \right)", r"[-1, \frac{\sqrt{2}}{2})", r"[-1, \frac{1}{\sqrt{2}}]"),
    (r"(3+\sqrt{5},-1)", r"(\sqrt{5}+3, -1)", r"(-1, 3+\sqrt{5})"),
    ("32_{(8)}", "32_8", "32_9"),
    ("p!", "p!", "p"),
    (r"2400 \mbox{ cm}^2", r"2400\text{ cm}^2", r"2400\text{ cm}^3"),
    (r"25.4551\%", "25.4551%", "25.4%"),
    (
        r"\begin{pmatrix} -20/13 \\ -4/13 \end{pmatrix}",
        r"\begin{pmatrix} -\frac{20}{13} \\ -\frac{4}{13} \end{pmatrix}",
        r"\begin{pmatrix} -4/13 \\ -20/13 \end{pmatrix}",
    ),
    (r"(2, 1, 4, 1) \text{ and } (2, 1, 1, 4)", "(2,1,4,1), (2,1,1,4)", "(2,1,4,1)"),
    ("268.90625", r"\frac{8605}{32}", "268.9"),
    (r"\frac{\sqrt{2}}{2}(1 - \ln 2)", r"\frac{1-\ln 2}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}(1 + \ln 2)"),
    ("n=3", "3", "n=4"),
    (r"\frac{3 \cdot 2^{1/3}}{4}", r"\frac{3\sqrt[3]{2}}{4}", r"\frac{3\sqrt{2}}{4}"),
    (r"1,\!296,\!540", "1296540", "1296.540"),
    (r"\$23{,}000", "23,000", "23"),
    ("x + 3", "3 + x", "x - 3"),
    (r"61^{\circ}", "61", "16"),
    ("2x^2 - 12x + 20", "2(x^2-6x+10)", "2x^2 - 12x"),
    (r"\text{No}", "no", "yes"),
    (r"\text{(E)},", "E", "D"),
    ("$222,222,222,223$", "222222222223", "222222222222"),
    (r"400 - 100\pi", r"100(4-\pi)", r"100\pi - 400"),
    ("(0, 0, 2), (1, 1, 2), (2, 2, 3)", "(1,1,2), (0,0,2), (2,2,3)", "(0,0,2), (1,1,2)"),
    ("16:9", r"\frac{16}{9}", "9:16"),
]


@pytest.mark.parametrize(("gold", "other", "miss"), GOLDS)
def test_realistic_gold_answers_accept_other_spellings_and_refuse_near_misses(gold, other, miss):
    assert is_equal_as_text(gold, gold) is True
    assert is_equal(other, gold) is True
    assert is_equal(miss, gold) is False


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
        ("1/2", "0.5", None),
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
    ],
)
def test_hostile_answers_are_read_at_once(unit):
    answer = (unit * MAX_BOX_CHARS)[:MAX_BOX_CHARS]
    start = time.process_time()
    assert is_equal_as_text(answer, "5") is not True
    assert time.process_time() - start < 1  # milliseconds; seconds would be an exponential pattern


def test_importing_the_module_does_not_import_sympy():
    check = (
        "import sys, grpo_mcore.reward.math_answer; sys.exit('sympy' in sys.modules or 'math_verify' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", check], cwd=Path(__file__).parents[2], check=True, timeout=60)
