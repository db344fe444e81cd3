"""From graded groups to a result, its metrics, its protocol and its comparison.

Not covered here: the numbers themselves (test_scores.py), sampling, which needs engines (test_launch.py).
"""

import dataclasses
import json

import pytest
import transformers

from grpo_mcore.config import config
from grpo_mcore.data import arithmetic, prompts
from grpo_mcore.evaluate import evaluate, scores
from grpo_mcore.reward.graded import Graded
from grpo_mcore.reward.grader import Status, Verdict
from grpo_mcore.types import Group, Prompt, Response

WRONG = Verdict(0.0, Status.WRONG, "6 ", "")
RIGHT = Verdict(1.0, Status.CORRECT, r"5\text{ cm}", "")
NONE = Verdict(0.0, Status.TRUNCATED, None, "")


def group(id: int, *lengths: int) -> Group:
    return Group(Prompt(id, "p", "5", (1,)), tuple(Response((7,) * n, (0.0,) * n, n == 9, 0) for n in lengths))


def result(*verdicts: Verdict) -> scores.Result:
    """Of two problems with two responses each."""
    graded = [Graded(0, group(3, 1, 2), verdicts[:2]), Graded(1, group(8, 9, 4), verdicts[2:])]
    return evaluate.result_of(graded, config.Config("m", "r", 1, config.Data("t")))


RESULT = result(RIGHT, WRONG, NONE, RIGHT)


def test_verdicts_are_matched_with_responses_in_order_and_answers_have_one_spelling():
    assert RESULT.problems == (
        scores.Problem(3, "5", (1.0, 0.0), ("5", "6"), (1, 2), (False, False)),
        scores.Problem(8, "5", (0.0, 1.0), (None, "5"), (9, 4), (True, False)),
    )


def test_metrics_carry_k_in_their_names():
    # maj@2: a tie of a right and a wrong answer, and one vote that is right
    assert RESULT.metrics() == {
        "eval/mean@2": 0.5,
        "eval/pass@2": 1.0,
        "eval/maj@2": 0.75,
        "eval/standard_error": 0.0,
        "eval/truncated_frac": 0.25,
        "eval/overlong_left_out": 0.0,
    }
    assert (
        str(RESULT)
        == "mean@2 0.500 ± 0.000 (95%: 0.500 to 0.500), pass@2 1.000, maj@2 0.750 (2 problems, 25.0% truncated)"
    )


def test_problems_that_were_left_out_are_said_with_the_score():
    left_out = dataclasses.replace(RESULT, num_left_out=3)
    assert left_out.metrics()["eval/overlong_left_out"] == 3
    assert "(2 problems, 3 more left out as over-long, 25.0% truncated)" in str(left_out)


@pytest.fixture
def card(tmp_path) -> dict:
    arithmetic.make_model(tmp_path / "model", seed=0)
    cfg = config.Config(
        model="",
        run_dir="",
        num_steps=1,
        data=config.Data("", prompt_template="{problem}=", chat_template=False),
        eval=config.Eval(data="x", temperature=0.6),
    )
    tokenizer = prompts.Tokenizer(str(tmp_path / "model"))
    return evaluate.protocol(cfg, [Prompt(3, "1+2", "3", tokenizer.encode("1+2", cfg.data))], 4, tokenizer)


def test_the_protocol_says_what_the_numbers_depend_on_and_survives_json(card):
    assert json.loads(json.dumps(card)) == card
    assert (
        card["temperature"],
        card["max_response_tokens"],
        card["seed"],
        card["over_long_left_out"],
        card["num_problems"],
    ) == (0.6, 7168, 42, 4, 1)
    assert card["first_prompt"] == "1+2=" and card["prompt_template"] == "{problem}="
    assert card["grader"]["verifier"] == "math_verify" and card["versions"]["transformers"] == transformers.__version__


def test_an_earlier_evaluation_is_read_back_and_compared(card, tmp_path):
    path = tmp_path / "earlier.json"
    path.write_text(
        json.dumps(
            {"protocol": {**card, "temperature": 1.0}, "problems": [dataclasses.asdict(p) for p in RESULT.problems]}
        )
    )
    problems, other = evaluate.read_problems(str(path))
    assert tuple(problems) == RESULT.problems
    better = result(RIGHT, RIGHT, NONE, RIGHT)
    seen = evaluate.compare(better, card, problems, other)
    # differences 1/2 and 0: 1/4 +- sqrt((1/16 + 1/16) / 1 / 2) = 1/4
    assert seen["difference"] == {
        "value": 0.25,
        "standard_error": 0.25,
        "low": pytest.approx(-0.24),
        "high": pytest.approx(0.74),
    }
    assert (seen["num_better"], seen["num_worse"], seen["protocols_differ_in"]) == (1, 0, ["temperature"])


def test_what_cannot_be_compared_is_refused(tmp_path):
    for text in ("{}", "[", '{"protocol": {}, "problems": [{"id": 3}]}'):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(
            config.InputError, match="--compare = .*x.json.*: is not what launch/evaluate.py --out wrote"
        ):
            evaluate.read_problems(str(tmp_path / "x.json"))
    now = [Prompt(3, "p", "5", (1,)), Prompt(8, "p", "5", (1,))]
    evaluate.check_paired(now, RESULT.problems)
    for others in (now[:1], [now[0], Prompt(8, "p", "6", (1,))], [now[0], Prompt(9, "p", "5", (1,))]):
        with pytest.raises(config.InputError, match="--compare = '2 problems': are not the"):
            evaluate.check_paired(others, RESULT.problems)
