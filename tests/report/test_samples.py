"""What is said of a step's samples: worked numbers, and the rows of RUN/rollouts.

Not covered here: rows of real responses (tests/test_trainer.py).
"""

import pytest

from grpo_mcore.report.samples import rollout_rows, sample_metrics
from grpo_mcore.reward.graded import Graded
from grpo_mcore.reward.grader import Status, Verdict
from grpo_mcore.types import Group, Prompt, Response


def test_metrics_of_a_steps_samples_leave_masked_groups_out():
    def group(*lengths: int, masked: bool = False) -> Group:
        return Group(Prompt(0, "", "", (1,), masked), tuple(Response((2,) * n, (-1.0,) * n, n > 8, 0) for n in lengths))

    right, wrong = (Verdict(float(s is Status.CORRECT), s, "1", "") for s in (Status.CORRECT, Status.WRONG))
    masked = Graded(1, group(99, 99, masked=True), (right, right))
    seen = sample_metrics([Graded(0, group(3, 9), (right, wrong)), masked, Graded(2, group(5, 5), (wrong, wrong))])
    # Of 4 responses 1 is right, 1 is longer than 8, together 22 tokens; of 2 groups 1 is mixed.
    assert (seen["reward/mean"], seen["reward/mixed_groups_frac"], seen["reward/correct"], seen["reward/wrong"]) == (
        0.25,
        0.5,
        1.0,
        3.0,
    )
    assert (
        seen["rollout/response_tokens_mean"],
        seen["rollout/response_tokens_max"],
        seen["rollout/truncated_frac"],
    ) == (5.5, 9.0, 0.25)
    assert seen["rollout/masked_prompts_frac"] == pytest.approx(1 / 3)
    assert sample_metrics([masked])["reward/mean"] == 0.0


def test_rows_have_texts_of_the_first_groups_and_both_verdicts_where_both_were_asked():
    other = Verdict(0.0, Status.WRONG, "1", "not equal by text")
    verdicts = (Verdict(1.0, Status.CORRECT, "1", "equal", other), Verdict(0.0, Status.NO_ANSWER, None, "no box"))
    groups = [
        Group(Prompt(p, f"problem {p}", "1", (1, 2)), (Response((7,), (-1.0,), False, ((3, 1),)),) * 2) for p in (8, 9)
    ]
    graded = [Graded(position, g, verdicts) for position, g in zip((40, 42), groups, strict=True)]
    rows = list(rollout_rows(graded, keep_texts=1, decode=lambda ids: f"text of {ids[0]}"))
    assert [(r["position"], r["prompt_id"], r["sample"], r["reward"], r["status"]) for r in rows] == [
        (40, 8, 0, 1.0, "correct"),
        (40, 8, 1, 0.0, "no_answer"),
        (42, 9, 0, 1.0, "correct"),
        (42, 9, 1, 0.0, "no_answer"),
    ]
    assert rows[0] == {
        "position": 40,
        "prompt_id": 8,
        "sample": 0,
        "prompt_tokens": 2,
        "response_tokens": 1,
        "truncated": False,
        "versions": ((3, 1),),
        "reward": 1.0,
        "status": "correct",
        "answer": "1",
        "detail": "equal",
        "other_verifier": {"reward": 0.0, "status": "wrong", "answer": "1", "detail": "not equal by text"},
        "problem": "problem 8",
        "gold": "1",
        "response": "text of 7",
    }
    assert "problem" in rows[1] and "problem" not in rows[2] and "other_verifier" not in rows[1]


def test_of_several_sources_each_that_is_in_the_step_has_metrics_and_rows_name_theirs():
    right, wrong = (Verdict(float(s is Status.CORRECT), s, "1", "") for s in (Status.CORRECT, Status.WRONG))

    def graded(source: str, *verdicts: Verdict, masked: bool = False) -> Graded:
        prompt = Prompt(0, "", "", (1,), masked, source=source)
        return Graded(0, Group(prompt, (Response((2,), (-1.0,), True),) * len(verdicts)), verdicts)

    step = [graded("a", right, wrong), graded("a", right, right), graded("b", wrong, wrong)]
    seen = sample_metrics([*step, graded("c", right, right, masked=True)])
    assert {name: value for name, value in seen.items() if name.endswith(("/a", "/b", "/c"))} == {
        "reward/mean/a": 0.75,
        "reward/mixed_groups_frac/a": 0.5,
        "rollout/truncated_frac/a": 1.0,
        "rollout/prompts/a": 2.0,
        "reward/mean/b": 0.0,
        "reward/mixed_groups_frac/b": 0.0,
        "rollout/truncated_frac/b": 1.0,
        "rollout/prompts/b": 1.0,
    }
    assert [row["source"] for row in rollout_rows(step, keep_texts=0, decode=str)] == ["a", "a", "a", "a", "b", "b"]
