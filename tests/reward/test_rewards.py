"""What functions and verifiers make together: sums, statuses, what is tried before a run. Real processes.

Not covered here: a run with them (tests/data/test_runs.py, slow).
"""

import dataclasses
from pathlib import Path

import pytest

from grpo_mcore.config import metric_names, rules
from grpo_mcore.config.config import Config, Data, Eval, InputError, Reward, RewardFunction, Shaping
from grpo_mcore.evaluate.evaluate import result_of
from grpo_mcore.report.samples import rollout_rows, sample_metrics
from grpo_mcore.reward.functions import Case
from grpo_mcore.reward.graded import Graded
from grpo_mcore.reward.grader import Status
from grpo_mcore.reward.rewards import Rewards
from grpo_mcore.reward.shaping import normalised, shaped
from grpo_mcore.types import Group, Prompt, Response

FILE = Path(__file__).with_name("functions_of_each_style.py")


def of(function: str, weight: float = 1.0, **more: object) -> RewardFunction:
    return RewardFunction(f"{FILE}:{function}", weight=weight, **more)


def case(*texts: str, answer: str = "3") -> Case:
    columns = {"problem": "1+2", "answer": answer}
    return Case("1+2", answer, columns, "", texts, ((5,),) * len(texts), (False,) * len(texts))


CFG = Reward(
    num_processes=1,
    functions=(
        RewardFunction("math_verify", weight=2.0),
        of("plain", 0.5, name="last"),
        of("not_always", 1.0),
        RewardFunction("gsm8k", weight=0.0),
    ),
)
TEXTS = (r"\boxed{3}", "4", "3", r"\boxed{4} #### 3")


@pytest.fixture(scope="module")
def graded() -> Graded:
    with Rewards(CFG) as rewards:
        (verdicts,) = rewards.grade([case(*TEXTS)])
    responses = tuple(Response((5,) * n, (0.0,) * n, False) for n in (1, 2, 3, 4))
    return Graded(0, Group(Prompt(0, "1+2", "3", (1,)), responses), verdicts)


def test_the_reward_is_the_sum_of_weights_times_values(graded):
    assert [v.reward for v in graded.verdicts] == [2 + 0.5 + 2, 0.0, 0.5 + 2, 0.5 + 2]
    assert [[p.value for p in v.parts] for v in graded.verdicts] == [
        [1.0, 1.0, 2.0, 0.0],
        [0.0, 0.0, None, 0.0],
        [0.0, 1.0, 2.0, 0.0],
        [0.0, 1.0, 2.0, 1.0],
    ]
    assert {v.status for v in graded.verdicts} == {Status.SCORED}
    assert graded.verdicts[1].detail == "math_verify 0, last 0, not_always not_applicable, gsm8k 0"
    assert graded.verdicts[0].answer == "3"  # the first verifier's


def test_metrics_and_rows_say_what_each_function_said(graded):
    seen = sample_metrics([graded])
    assert seen["reward/mean"] == (4.5 + 0 + 2.5 + 2.5) / 4
    assert (seen["reward/scored"], seen["reward/failed"], seen["reward/not_applicable"]) == (4.0, 0.0, 0.0)
    assert (seen["reward/last/mean"], seen["reward/gsm8k/mean"]) == (0.75, 0.25)
    assert (seen["reward/not_always/mean"], seen["reward/not_always/not_applicable"]) == (2.0, 1.0)
    told = metric_names.of_steps(Config("m", "r", 1, Data("t"), reward=CFG))
    assert {n for n in told if n.startswith("reward/")} == {n for n in seen if n.startswith("reward/")} | {
        "reward/seconds"
    }
    rows = list(rollout_rows([graded], keep_texts=0, decode=str))
    assert [part["name"] for part in rows[0]["rewards"]] == ["math_verify", "last", "not_always", "gsm8k"]
    assert rows[1]["rewards"][2]["status"] == "not_applicable"


def test_normalised_values_have_mean_0_and_standard_deviation_1_of_those_there_are(graded):
    assert normalised([1.0, None, 3.0]) == pytest.approx([-(0.5**0.5), 0.0, 0.5**0.5])
    assert normalised([2.0, 2.0, None]) == [0.0, 0.0, 0.0] == normalised([None, None, None])
    cfg = dataclasses.replace(CFG, combine="normalized_sum")
    verify, last = normalised([1.0, 0.0, 0.0, 0.0]), normalised([1.0, 0.0, 1.0, 1.0])
    expected = [2 * a + 0.5 * b for a, b in zip(verify, last, strict=True)]  # not_always has no variance
    assert shaped([graded], cfg, Shaping(), 100)[0].tolist() == pytest.approx(expected)
    assert shaped([graded], CFG, Shaping(), 100)[0].tolist() == [4.5, 0.0, 2.5, 2.5]


@pytest.mark.parametrize(
    ("named", "scores", "answers"),
    [
        ("math_verify", (1.0, 0.0, 0.0, 0.0), ("3", None, None, "4")),
        ("gsm8k", (0.0, 0.0, 0.0, 1.0), (None, None, None, "3")),
        ("not_always", (2.0, 0.0, 2.0, 2.0), (None,) * 4),
        (None, (4.5, 0.0, 2.5, 2.5), (None,) * 4),
    ],
)
def test_an_evaluation_names_the_reward_that_decides(graded, named, scores, answers):
    cfg = Config("m", "r", 1, Data("t"), reward=CFG, eval=Eval(data="x", reward=named))
    result = result_of([graded], cfg)
    assert (result.problems[0].rewards, result.problems[0].answers) == (scores, answers)
    assert set(result.metrics()) == set(
        metric_names.of_evaluations(dataclasses.replace(cfg, eval=Eval(data="x", reward=named, samples_per_prompt=4)))
    )
    assert ("eval/maj@4" in result.metrics()) == (named in ("math_verify", "gsm8k")) == ("maj@4" in str(result))


def test_a_function_that_fails_is_a_status_of_the_whole_and_the_others_count():
    cfg = Reward(num_processes=1, cpu_s=0.5, functions=(of("plain"), of("raises"), of("spins", name="slow")))
    with Rewards(cfg) as rewards:
        ((first, second),) = rewards.grade([case("#### 3", "3")])
    assert (first.status, second.status) == (Status.TIMED_OUT, Status.FAILED)
    assert (first.reward, second.reward) == (1.0 + 3.0, 1.0)
    assert [p.status for p in second.parts] == [Status.SCORED, Status.FAILED, Status.TIMED_OUT]


def test_without_functions_it_is_the_verifiers_verdict():
    with Rewards(Reward(num_processes=1, verifier="dapo")) as rewards:
        (verdicts,) = rewards.grade([case("Answer: 3", r"\boxed{3}")])
    assert [(v.reward, v.status) for v in verdicts] == [(1.0, Status.CORRECT), (0.0, Status.NO_ANSWER)]


@pytest.mark.parametrize("name", ["says_words", "unknown_column", "sleeps", "exits"])
def test_a_function_that_fails_on_all_rows_ends_the_run_before_it_begins(name):
    cfg = Reward(num_processes=1, cpu_s=1.0, wall_s=2.0, functions=(of("plain"), of(name)))
    with Rewards(cfg) as rewards, pytest.raises(InputError, match=r"reward.functions\[1\] = .*: fails on 4 of 4"):
        rewards.check([case("")] * 2)


def test_what_fails_on_some_rows_is_said_and_what_is_well_is_described():
    with Rewards(Reward(num_processes=1, functions=(of("raises", 0.5), RewardFunction("boxed")))) as rewards:
        (warning,) = rewards.check([case("")] * 2)
        assert "raises fails on 2 of 4 responses made for the first rows (IndexError" in warning
        assert rewards.describe() == "sum of 0.5 x raises (plain), 1 x boxed"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"functions": (RewardFunction("maths"),)}, r"functions\[0\].path = 'maths': is neither FILE.py:NAME"),
        ({"functions": (RewardFunction("f.py:"),)}, "must name a function behind the colon"),
        ({"functions": (of("plain"), of("plain"))}, r"functions\[1\].name = 'plain': is no name, or another"),
        ({"functions": (of("plain", name="a/b"),)}, r"functions\[0\].name = 'a/b'"),
        ({"functions": (of("plain", cpu_s=-1.0),)}, r"functions\[0\].cpu_s = -1.0: must be greater than 0"),
        ({"functions": (of("plain", cpu_s=30.0),)}, r"functions\[0\].cpu_s = 30.0: must be at most wall_s, 20"),
        ({"functions": (RewardFunction("boxed", style="trl"),)}, "is no function, and has neither a style"),
        ({"combine": "normalized_sum"}, "reward.combine = 'normalized_sum': is about reward.functions"),
        ({"functions": (of("plain"),), "compare_verifiers": True}, "reward.compare_verifiers = True"),
    ],
)
def test_what_cannot_be_is_refused_with_the_configuration(more, words):
    with pytest.raises(InputError, match=words):
        rules.check(Config("m", "r", 1, Data("t"), reward=Reward(**more)))


def test_an_unknown_deciding_reward_is_refused():
    with pytest.raises(InputError, match="eval.reward = 'nowhere': is none of reward.functions"):
        rules.check(Config("m", "r", 1, Data("t"), reward=CFG, eval=Eval(reward="nowhere")))
