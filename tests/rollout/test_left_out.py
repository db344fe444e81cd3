"""data.max_pass_rate: which prompts are not sampled again, with engines and a grader that answer at once.

Not covered here: real engines (test_rollout.py), the decisions alone (test_admission.py).
"""

import random
from concurrent.futures import Future

import pytest

from grpo_mcore.config import config
from grpo_mcore.data.prompts import Stream
from grpo_mcore.reward.grader import Status, Verdict
from grpo_mcore.rollout.engine import Completion
from grpo_mcore.rollout.rollout import Rollout
from grpo_mcore.types import Prompt

G = 4


class Engines:
    """Each response is one token that says which of the stream's positions it answers."""

    num_failures = 0

    def __init__(self):
        self.version = 0

    def submit(self, key, token_ids, sampling, phase) -> Future:
        answer: Future = Future()
        answer.set_result([Completion((1000 * token_ids[0] + key[-1],), (0.0,), False, ((self.version, 1),))] * G)
        return answer

    def cancel(self, keys) -> None:
        pass

    def check(self) -> None:
        pass


class Texts:
    """In the place of a tokenizer: a response's text is its token's number."""

    @staticmethod
    def decode(token_ids) -> str:
        return str(token_ids[0])


class Grader:
    """Each prompt has a pass rate that rises and falls with the position, always the same way."""

    @staticmethod
    def grade(cases) -> list[tuple[Verdict, ...]]:
        right = [random.Random(case.texts[0]).randrange(G + 1) for case in cases]
        return [
            tuple(
                Verdict(1.0, Status.CORRECT, "1", "") if i < n else Verdict(0.0, Status.WRONG, "0", "")
                for i in range(G)
            )
            for n in right
        ]


def run(steps: int, state=(0, 0, ()), *, most: float | None = 0.75, weights=(1.0,), **rollout):
    """(what each step took: positions, sources and ids; the state afterwards), from a state on."""
    cfg = config.Config("", "", 99, config.Data("", max_pass_rate=most), rollout=config.Rollout(**rollout))
    prompts = [Prompt(i, "", "", (10 * s + i,), source=str(s)) for s in range(len(weights)) for i in range(9)]
    step, cursor, left_out = state
    engines = Engines()
    ours = Rollout(engines, Stream(prompts, 3, weights=weights), Texts, Grader, cfg, cursor=cursor, left_out=left_out)
    taken = []
    try:
        for version in range(step, step + steps):
            engines.version = version
            ours.begin(version)
            sampled = ours.take()
            taken.append(
                [(g.position, g.group.prompt.source, g.group.prompt.id, sum(g.rewards)) for g in sampled.graded]
            )
            state = (version + 1, sampled.cursor, sampled.left_out)
    finally:
        ours.close()
    return taken, state


SETTINGS = {
    "plain": {},
    "dynamic": {"dynamic_sampling": True, "oversampling_frac": 0.5},
    "mixture": {"weights": (3.0, 1.0)},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_who_has_reached_the_rate_is_never_sampled_again(name):
    taken, (_, _, left_out) = run(4, group_size=G, prompts_per_step=2, **SETTINGS[name])
    gone: set = set()
    for step in taken:
        assert not gone & {(source, i) for _, source, i, _ in step}
        gone |= {(source, i) for _, source, i, right in step if right >= 3}
    assert gone and gone <= {(source, i) for source, ids in zip(("0", "1"), left_out, strict=False) for i in ids}


def test_groups_that_were_passed_over_count_too():
    _, (_, _, left_out) = run(2, most=1.0, group_size=G, prompts_per_step=3, dynamic_sampling=True)
    assert left_out[0]  # all right, and so without variance


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_that_is_taken_up_draws_what_the_undisturbed_one_draws(name):
    keys = {"group_size": G, "prompts_per_step": 2, **SETTINGS[name]}
    whole, end = run(4, **keys)
    for stop in (1, 2, 3):
        before, state = run(stop, **keys)
        after, at_end = run(4 - stop, state, **keys)
        assert before + after == whole and at_end == end


def test_without_a_rate_none_is_left_out_also_not_what_a_checkpoint_knows():
    taken, (_, _, left_out) = run(2, (0, 0, [list(range(9))]), most=None, group_size=G, prompts_per_step=2)
    assert left_out == [[]] and [p for step in taken for p, *_ in step] == [0, 1, 2, 3]


def test_the_end_of_all_prompts_ends_the_run_with_words():
    with pytest.raises(config.RunError, match="after 5 steps every prompt has been left out by data.max_pass_rate = 0"):
        run(1, (5, 20, [list(range(9))]), group_size=G, prompts_per_step=2)
