"""The names of metrics are told before a run by what writes them: here those that depend on the configuration.

Not covered here: all of a run's (test_trainer.py compares them with the rows of one).
"""

import dataclasses

import pytest
import torch

from grpo_mcore.config import metric_names
from grpo_mcore.config.config import Config, Data, Eval, Loss, Reward, Source
from grpo_mcore.evaluate.scores import Problem, Result
from grpo_mcore.loss import loss
from grpo_mcore.report import metrics
from grpo_mcore.report.samples import sample_metrics
from grpo_mcore.reward.graded import Graded
from grpo_mcore.reward.grader import Status, Verdict
from grpo_mcore.types import Group, Prompt, Response
from tests.loss.test_loss import tokens, value_and_gradient

PLAIN = Config("model", "run", 1, Data("train"))


OF_EVERY_UPDATE = (
    "loss grad_norm lr entropy microbatches packed_frac imbalance".split()
)  # by the policy and the trainer
LOSSES = [
    Loss(),
    Loss(kl_coef=0.1),
    Loss(clip_dual=3.0),
    Loss(policy_loss="gspo", importance_level="token"),
    Loss(policy_loss="cispo", entropy_coef=0.1),
]


@pytest.mark.parametrize("cfg", LOSSES, ids=str)
def test_what_a_loss_says_is_told(cfg):
    ones = [1.0, 1.0]
    m = tokens(old=ones, advantage=ones, weight=ones, ref=ones, rollout=ones)
    _, _, stats = value_and_gradient(ones, m, cfg)
    found = {f"update/{name}" for name in stats}
    if cfg.importance_level != "none":
        found |= metrics.importance(*loss.importance(m, cfg)).keys()
    names = metric_names.of_steps(dataclasses.replace(PLAIN, loss=cfg))
    always = {f"update/{name}" for name in OF_EVERY_UPDATE}
    assert {name for name in names if name.startswith(("update/", "importance/"))} == found | always


def test_what_engines_sampled_is_told():
    found = metrics.mismatch(torch.zeros(2), torch.zeros(2), torch.tensor([0, 300]))
    names = metric_names.of_steps(PLAIN)
    assert {name for name in names if name.startswith("mismatch/")} == {
        name for name in found if not metric_names.is_sometimes(name)
    }


@pytest.mark.parametrize("other", [None, Verdict(0.0, Status.WRONG, "2", "")])
def test_what_a_grader_says_is_told(other):
    group = Group(Prompt(0, "1 + 1", "2", (1,)), (Response((7,), (0.0,), False),))
    found = sample_metrics([Graded(0, group, (Verdict(1.0, Status.CORRECT, "2", "", other=other),))])
    names = set(metric_names.of_steps(dataclasses.replace(PLAIN, reward=Reward(compare_verifiers=other is not None))))
    assert found.keys() <= names
    assert {n for n in names if n.startswith("reward/")} == {n for n in found if n[:7] == "reward/"} | {
        "reward/seconds"
    }


def test_what_is_said_of_each_source_is_told():
    groups = [Group(Prompt(0, "1 + 1", "2", (1,), source=name), (Response((7,), (0.0,), False),)) for name in "ab"]
    found = sample_metrics([Graded(0, g, (Verdict(1.0, Status.CORRECT, "2", ""),)) for g in groups])
    told = {prefix + name for prefix in metric_names.OF_SOURCE for name in "ab"}
    assert {name for name in found if name.endswith(("/a", "/b"))} == told
    assert found.keys() - told <= set(metric_names.of_steps(PLAIN))
    problems = tuple(Problem(0, "2", (1.0,), ("2",), (3,), (False,), name) for name in "ab")
    cfg = dataclasses.replace(PLAIN, eval=Eval(data=(Source("a"), Source("b.jsonl")), samples_per_prompt=1))
    assert sorted(metric_names.of_evaluations(cfg)) == sorted(Result(problems).metrics())


def test_how_many_prompts_are_left_out_is_told_where_some_may_be():
    some = dataclasses.replace(PLAIN, data=Data("train", max_pass_rate=0.9))
    assert set(metric_names.of_steps(some)) - set(metric_names.of_steps(PLAIN)) == {"rollout/prompts_left_out"}


@pytest.mark.parametrize("k", [1, 4])
def test_what_an_evaluation_says_is_told(k):
    result = Result((Problem(0, "2", (1.0,) * k, ("2",) * k, (3,) * k, (False,) * k),))
    cfg = dataclasses.replace(PLAIN, eval=Eval(data="x.jsonl", samples_per_prompt=k))
    assert sorted(metric_names.of_evaluations(cfg)) == sorted(result.metrics())
    assert metric_names.of_evaluations(PLAIN) == []
