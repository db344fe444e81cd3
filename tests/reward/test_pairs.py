"""math_answer.py on the table of pairs.py, all of it at once, so that a failure shows what else a change has moved."""

from collections import Counter

from grpo_mcore.reward.math_answer import extract_boxed, is_equal, is_equal_as_text
from tests.reward.answers import PAIRS as OF_BOTH_VERIFIERS
from tests.reward.pairs import ONE_WAY, PAIRS, RESPONSES


def questions():
    """(kind, answer, gold, equal, rule), in each direction in which it holds."""
    for kind, pairs in PAIRS.items():
        for gold, answer, equal, rule in pairs:
            yield kind, answer, gold, equal, rule
            yield kind, gold, answer, equal, rule
    for kind, pairs in ONE_WAY.items():
        for gold, answer, equal, rule in pairs:
            yield kind, answer, gold, equal, rule
    for gold, response, equal, rule in RESPONSES:
        yield "several boxes", extract_boxed(response) or "", gold, equal, rule


def test_each_pair_is_judged_by_its_rule_in_both_directions():
    wrong: dict[str, list[str]] = {}
    for kind, answer, gold, equal, rule in questions():
        if is_equal(answer, gold) is not equal:
            said = "must equal" if equal else "must not equal"
            wrong.setdefault(kind, []).append(f"{answer!r} {said} the gold {gold!r}: {rule}")
    assert wrong == {}


def test_text_never_contradicts_the_algebra():
    wrong = [
        (answer, gold)
        for _, answer, gold, equal, _ in questions()
        if is_equal_as_text(answer, gold) not in (None, equal)
    ]
    assert wrong == []


def test_each_answer_of_the_table_equals_itself_as_text():
    answers = {text for pairs in PAIRS.values() for gold, answer, *_ in pairs for text in (gold, answer)}
    assert [text for text in answers if text.strip("$. ") and is_equal_as_text(text, text) is not True] == []


def test_the_table_has_each_pair_once_and_both_verdicts_of_each_kind():
    pairs = [frozenset((gold, answer)) for rows in PAIRS.values() for gold, answer, *_ in rows]
    of_both = {frozenset((gold, answer)) for answer, gold, *_ in OF_BOTH_VERIFIERS}
    assert [sorted(pair) for pair, times in Counter(pairs).items() if times > 1 or pair in of_both] == []
    assert len(pairs) >= 300
    assert all({equal for *_, equal, _ in rows} == {True, False} for rows in [*PAIRS.values(), RESPONSES])
