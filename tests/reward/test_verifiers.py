r"""Both verifiers on one corpus (answers.py): what they must say, and that nothing hangs or crashes them. And the
second one's own rules.

Not covered here: the processes and their limits (test_grader.py), math_answer.py's rules one by one
(test_math_answer.py).
"""

import time
from dataclasses import replace

import pytest

from grpo_mcore.config.config import Reward
from grpo_mcore.reward import boxed_answer
from grpo_mcore.reward.grader import Grader, Status, Verdict
from grpo_mcore.reward.verifiers import VERIFIERS
from tests.reward.answers import HOSTILE, HOSTILE_RESPONSES, PAIRS

# A wide clock: other processes may keep the cores busy.
CFG = Reward(num_processes=1, cpu_s=0.5, wall_s=30.0, memory_bytes=1 << 30)


def boxed(answer: str) -> str:
    return rf"<think>perhaps \boxed{{0}}</think> It is \boxed{{{answer}}}."


def test_the_corpus_is_judged_as_expected_by_both_verifiers():
    assert len(PAIRS) + len(HOSTILE) + len(HOSTILE_RESPONSES) >= 300 and len(set(PAIRS)) == len(PAIRS)
    with Grader(replace(CFG, num_processes=2, cpu_s=10.0, compare_verifiers=True)) as grader:
        verdicts = grader.grade([(boxed(answer), gold, False) for answer, gold, *_ in PAIRS])
    wrong = [
        (answer, gold, v.detail, v.other.detail)
        for (answer, gold, *expected), v in zip(PAIRS, verdicts, strict=True)
        if [v.reward == 1, v.other.reward == 1] != expected
    ]
    assert wrong == []
    assert all(v.answer == v.other.answer and v.status in (Status.CORRECT, Status.WRONG) for v in verdicts)
    assert sum(v.is_disputed for v in verdicts) == sum(mine != other for *_, mine, other in PAIRS) > 0


OF_BOXES = ["math_verify", "boxed"]


@pytest.mark.parametrize("name", OF_BOXES)
def test_hostile_answers_end_within_their_limits_and_never_crash_the_grader(name):
    items = [(boxed(answer), "5.5", False) for answer in HOSTILE] + [(text, "5.5", False) for text in HOSTILE_RESPONSES]
    # honest ones between killed processes
    items += [(boxed(rf"\sqrt{{{n * n + 1}}}+x"), rf"x+\sqrt{{{n * n + 1}}}", False) for n in range(5)]
    began = time.monotonic()
    with Grader(replace(CFG, num_processes=2, verifier=name)) as grader:
        verdicts = grader.grade(items)
    for (text, _, _), v in zip(items, verdicts, strict=True):
        assert v.status in Status and v.detail, text[:80]
        # not by the clock, nor by a crash
        assert v.status != Status.TIMED_OUT or "killed after cpu_s" in v.detail, (text[:80], v)
    assert [v.status for v in verdicts[-5:]] == [Status.CORRECT] * 5
    stopped = sum(v.status == Status.TIMED_OUT for v in verdicts)
    assert 0 < stopped <= 30
    # a kill costs 0.5 s and the start of another process; loaded machines included
    assert time.monotonic() - began < 30 + 6 * stopped


@pytest.mark.parametrize("name", VERIFIERS)
def test_what_runs_in_the_graders_own_process_is_fast_whatever_the_answer(name):
    verifier = VERIFIERS[name]

    def seconds(text: str) -> float:
        began = time.thread_time()
        answer = verifier.extract(text)
        if answer is not None:
            verifier.compare_text(answer, "5.5")
            verifier.compare_text(answer, answer[::-1])
            verifier.normalise(answer)
        return time.thread_time() - began

    for text in HOSTILE_RESPONSES + [boxed(answer) for answer in HOSTILE]:
        # A collection of all that earlier tests have left counts as this thread's: not every time.
        assert any(seconds(text) < 1.0 for _ in range(3)), text[:80]


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"The answer is \boxed{42}.", "42"),
        (r"\boxed{1} then \boxed{99}", "99"),
        (r"<think>maybe \boxed{7}</think> so \boxed{8}", "8"),
        (r"<think>maybe \boxed{7}</think> so 8", None),
        (r"maybe \boxed{7}</think> so \boxed{8}</think> ha", "8"),
        (r"\boxed{7} when the length limit struck", "7"),
        (r"\boxed{\frac{3}{4}}", r"\frac{3}{4}"),
        (r"\boxed{1} and \boxed{2", None),  # the last one counts, closed or not
        (r"\boxed{\boxed{5}+1}", "5"),  # the inner opens last
        (r"\fbox{5}", "5"),
        (r"\boxed{}", None),
        (r"\boxed{" + "1" * 512 + "}", "1" * 512),
        (r"\boxed{1} \boxed{" + "1" * 513 + "}", None),
        ("", None),
    ],
)
def test_the_second_verifier_reads_the_last_box_that_is_opened(text, box):
    assert boxed_answer.extract_boxed(text) == box


@pytest.mark.parametrize(
    ("answer", "gold", "equal", "rule"),
    [
        ("5", "5", True, "text"),
        ("2/4", "1/2", False, "text: fractions are compared as written"),
        (r"\sqrt{16}", "4", False, "text: an integer equals only itself"),
        ("(1,2)", "[1,2]", False, "text: other brackets or another number of elements"),
        ("a+b+c", "c+b+a", False, "text: more than two letters"),
        ("x^{12}", "x^6x^6", False, "text: not for sympy"),
        ("x+1", "1+x", True, "sympy"),
        ("x+2", "1+x", False, "sympy"),
        (r"\,", "5", False, "text: blank"),
        ("(1,x+1)", "(1,1+x)", True, "sympy"),
        ("(2,x+1)", "(1,1+x)", False, "text: an integer equals only itself"),
    ],
)
def test_the_second_verifier_names_the_rule_that_decided(answer, gold, equal, rule):
    assert boxed_answer.compare(answer, gold) == (equal, rule)


def test_a_verdict_explains_itself_and_carries_the_other_verifiers():
    with Grader(replace(CFG, verifier="boxed", compare_verifiers=True)) as grader:
        (v,) = grader.grade([(boxed(r"\sqrt{16}"), "4", False)])
    assert v == Verdict(
        0.0,
        Status.WRONG,
        r"\sqrt{16}",
        "not equal by text: an integer equals only itself",
        Verdict(1.0, Status.CORRECT, r"\sqrt{16}", "equal by math-verify"),
    )
    assert v.is_disputed


def test_without_comparison_there_is_no_other_verdict():
    with Grader(CFG) as grader:
        assert [v.other for v in grader.grade([(boxed("5"), "5", False), ("", "5", False)])] == [None, None]


@pytest.mark.parametrize("name", OF_BOXES)
def test_thinking_may_be_required_to_end(name):
    items = [(r"\boxed{5}", "5", False), (r"so</think> \boxed{5}", "5", False), (r"\boxed{5}", "5", True)]
    with Grader(replace(CFG, verifier=name, require_think=True)) as grader:
        verdicts = grader.grade(items)
    assert [(v.status, v.detail) for v in verdicts] == [
        (Status.NO_ANSWER, "no </think>"),
        (Status.CORRECT, "equal by text"),
        (Status.TRUNCATED, "no </think>"),
    ]
    with Grader(replace(CFG, verifier=name)) as grader:
        assert [v.reward for v in grader.grade(items)] == [1.0] * 3


def test_an_unknown_verifier_is_refused():
    with pytest.raises(ValueError, match="verifier = 'exact': must be one of math_verify, boxed"):
        Grader(replace(CFG, verifier="exact"))
