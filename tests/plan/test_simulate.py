"""The simulator: worked numbers, the token-by-token oracle, and that every response comes once.

Not covered here: how well it predicts real runs (benchmarks/results/simulate.json).
"""

import random
from fractions import Fraction
from itertools import accumulate

import pytest

from grpo_mcore.config import config
from grpo_mcore.plan.cluster import Cluster, Draw, EngineProfile, Failures, TrainerProfile
from grpo_mcore.plan.simulate import Simulation
from tests.reference import engines as oracle


def simulation(
    lengths,
    *,
    profile=EngineProfile(((1, 1), (2, 1))),
    trainer=TrainerProfile(),
    failures=None,
    num_engines=1,
    max_running=2,
    group_size=2,
    prompts=1,
    prompt_tokens=0,
    **rollout,
):
    """`lengths`: the responses of each prompt in turn."""
    return Simulation(
        config.Rollout(prompts_per_step=prompts, group_size=group_size, **rollout),
        config.Engine(num_engines=num_engines, max_running_responses=max_running),
        Cluster(profile, trainer, failures),
        lambda p: Draw(prompt_tokens, lengths[p % len(lengths)]),
    )


class Lives(Failures):
    """As given, one after the other."""

    def __init__(self, lives, restart_s):
        super().__init__(0, restart_s)
        object.__setattr__(self, "_lives", iter(lives))

    def life_s(self, rng):
        return next(self._lives)


def test_one_engine_two_responses():
    """Iterations of 2 s with two responses and 1 s with one: 3 x 2 s, then 4 x 1 s; the trainer takes 1 s + 0.5 s a
    token, a refit 3 s."""
    sim = simulation(
        [(3, 7)], profile=EngineProfile(((1, 1), (2, 2))), trainer=TrainerProfile(step_s=1, token_s=0.5, refit_s=3)
    )
    (step,) = sim.run(1)
    assert (step.refit_s, step.rollout_s, step.train_s, step.seconds) == (3, 10, 6, 19)
    assert (step.busy_s, step.slots_s) == (10, 16)  # two slots for 6 s, one for 4 s
    assert (step.response_tokens, step.staleness, step.max_staleness) == (10, 0, 0)


def test_an_iteration_takes_longer_the_more_is_in_the_cache():
    """10 s and 1 s per cached token, prompt of 4, one after the other: (10+4) + (10+5) + (10+6), then (10+4) +
    (10+5)."""
    sim = simulation([(3, 2)], profile=EngineProfile(((1, 10),), kv_token_s=1), prompt_tokens=4, max_running=1)
    assert sim.run(1)[0].rollout_s == 45 + 29


def test_a_prompt_is_computed_once_but_for_its_last_block():
    """21 tokens in blocks of 8: 21, then 5 for the sibling; 2 s a token, 3 s a response, then 4 iterations of 1 s."""
    for block_tokens, computed in ((8, 21 + 5), (0, 42), (7, 21 + 7)):
        profile = EngineProfile(((1, 1),), prefill_token_s=2, response_s=3, block_tokens=block_tokens)
        assert simulation([(4, 4)], profile=profile, prompt_tokens=21).run(1)[0].rollout_s == 2 * computed + 2 * 3 + 4


def test_two_engines_share_the_groups_and_the_slower_one_is_waited_for():
    sim = simulation([(3, 7), (5, 9)], prompts=2, num_engines=2)
    (step,) = sim.run(1)
    assert (step.rollout_s, step.busy_s, step.slots_s) == (9, 7 + 9, 3 + 7 + 5 + 9)


def test_what_has_no_slot_waits_for_one():
    """Two slots, responses of 4, 6 | 3, 1 tokens: the third starts at 4 and ends at 7, the fourth starts at 6 and ends
    at 7."""
    assert simulation([(4, 6), (3, 1)], prompts=2).run(1)[0].rollout_s == 7


def test_the_youngest_loses_its_place_when_the_cache_is_full():
    """The cache holds 10 tokens, no prompts: two responses reach 5 tokens each at 5 s, when the second leaves. The
    first ends at 8; the second is computed again, 5 tokens of 1 s each, and makes its last 3 by 8 + 5 + 3."""
    sim = simulation([(8, 8)], profile=EngineProfile(((1, 1),), kv_cache_tokens=10, prefill_token_s=1))
    (step,) = sim.run(1)
    assert (step.rollout_s, step.preemptions, step.response_tokens) == (16, 1, 16)


def test_a_failed_engines_requests_begin_anew_elsewhere_and_it_joins_at_the_next_refit():
    failures = Lives([4, 100, 100], 3)
    sim = simulation([(6, 6)], prompts=2, num_engines=2, trainer=TrainerProfile(step_s=1), failures=failures)
    first, second = sim.run(2)
    # Engine 0 dies at 4 and leaves its two responses to engine 1, which is busy until 6 and samples them until 12.
    assert (first.rollout_s, first.failures, first.issued_again, first.busy_s) == (12, 1, 1, 4 + 12)
    assert (second.rollout_s, second.failures, second.busy_s) == (6, 0, 12)


def test_if_no_engine_is_left_the_run_waits_for_the_first_and_refits_it():
    sim = simulation([(6, 6)], trainer=TrainerProfile(refit_s=2), failures=Lives([4, 100], 10))
    # It joins at 0, samples from 2 to 4, is back at 14, has the weights at 16 and the responses at 22.
    (step,) = sim.run(1)
    assert (step.refit_s, step.rollout_s, step.issued_again) == (2 + 2, 2 + 10 + 6, 1)


def test_if_the_last_engine_fails_while_it_is_refitted_there_is_another_refit():
    sim = simulation([(6, 6)], trainer=TrainerProfile(refit_s=10), failures=Lives([2, 100], 3))
    (step,) = sim.run(1)  # dead at 2, back at 5, given the weights from 10 to 20
    assert (step.refit_s, step.rollout_s, step.failures) == (20, 6, 1)


@pytest.mark.parametrize("train_s", [2, 6, 9])
def test_one_step_ahead_costs_the_longer_of_sampling_and_training(train_s):
    """Groups of 6 s, two at once in two engines; a synchronous step takes 6 + train_s."""

    def run(max_staleness):
        trainer = TrainerProfile(step_s=train_s)
        return simulation([(6, 6)], num_engines=1, trainer=trainer, max_staleness=max_staleness).run(6)[2:]

    assert [s.seconds for s in run(0)] == [6 + train_s] * 4
    assert [s.seconds for s in run(1)] == [max(6, train_s)] * 4
    assert [s.max_staleness for s in run(0)] == [0] * 4 and max(s.max_staleness for s in run(1)) == 1


def test_staleness_is_that_of_each_token():
    """One engine, one group at a time of 10 s; training takes 4 s. Step 1's group is sampled from 10 to 20, and the
    refit of version 1 comes at 14: 4 tokens of each response have version 0, 6 version 1, so step 1 trains on 0.4."""
    first, second = simulation([(10, 10)], trainer=TrainerProfile(step_s=4), max_staleness=1).run(2)
    assert (first.seconds, first.staleness) == (14, 0)
    assert (second.rollout_s, second.staleness, second.max_staleness) == (6, 0.4, 1)


def test_a_refit_suspends_what_runs_and_recomputes_its_cache():
    """As before with a refit of 2 s: sampling from 2 to 12; training until 16, refit until 18, when each response has 4
    tokens; 8 x 0.5 s to recompute them; the other 6 until 28."""
    parts = dict(profile=EngineProfile(((1, 1),), prefill_token_s=0.5), trainer=TrainerProfile(step_s=4, refit_s=2))
    for cache, again in (("recompute", 8 * 0.5), ("keep", 0)):
        _, second = simulation([(10, 10)], **parts, max_staleness=1, cache_after_refit=cache).run(2)
        assert (second.refit_s, second.rollout_s, second.staleness) == (2, 6 + again, 0.4)


def test_a_group_without_variance_is_replaced():
    """Of four prompts, the first gives nothing: with two a step, the third is drawn when that is known, at 3, and ends
    at 6."""
    sim = Simulation(
        config.Rollout(prompts_per_step=2, group_size=2, dynamic_sampling=True, max_draws=2),
        config.Engine(num_engines=4, max_running_responses=2),
        Cluster(EngineProfile(((1, 1),)), TrainerProfile()),
        lambda p: Draw(0, (3, 3), p > 0),
    )
    (step,) = sim.run(1)
    assert (step.positions, step.rollout_s) == ([1, 2], 6)


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_whatever_fails_every_response_is_trained_on_once(max_staleness):
    rng = random.Random(3)
    lengths = [tuple(rng.randint(1, 40) for _ in range(4)) for _ in range(200)]
    sim = simulation(
        lengths,
        prompts=6,
        group_size=4,
        num_engines=5,
        max_running=3,
        trainer=TrainerProfile(step_s=20, refit_s=3),
        failures=Failures(90, 30),
        max_staleness=max_staleness,
    )
    steps = sim.run(30)
    assert sum(s.failures for s in steps) > 20 and sum(s.issued_again for s in steps) > 20
    assert [p for s in steps for p in s.positions] == list(range(180))
    assert [s.response_tokens for s in steps] == [sum(sum(lengths[p]) for p in s.positions) for s in steps]
    ahead = sum(s.sampled for s in steps) - 30 * 6 * 4
    assert 0 <= ahead <= max_staleness * 6 * 4 and all(s.max_staleness <= max_staleness for s in steps)


def both(seed):
    """The simulator and its oracle: small, with exact seconds, so that what comes first in one comes first in the
    other."""
    rng = random.Random(seed)

    def seconds(low, high):
        return Fraction(rng.randint(low * 997, high * 997), 997)

    max_running, group_size = rng.randint(1, 5), rng.randint(2, 4)
    by_n = [seconds(1, 3)]
    for _ in range(max_running - 1):
        by_n.append(by_n[-1] + seconds(0, 1))
    dynamic = rng.random() < 0.5
    admission = dict(
        max_staleness=rng.randint(0, 2),
        dynamic_sampling=dynamic,
        oversampling_frac=rng.choice([0, 0.5]) if dynamic else 0.0,
        max_draws=rng.choice([1, 2, 3]) if dynamic else 1,
    )
    prompts, num_engines, recompute = rng.randint(1, 4), rng.randint(1, 4), rng.random() < 0.5
    kv, prefill, start = rng.choice([0, seconds(0, 1) / 50]), seconds(0, 1) / 10, seconds(0, 1) / 10
    block, capacity = rng.choice([0, 1, 4]), rng.choice([None, rng.randint(12, 80)])
    step_s, token_s, pair_s, refit_s = seconds(0, 40), seconds(0, 1) / 10, seconds(0, 1) / 500, seconds(0, 5)
    lives = [seconds(100, 600) for _ in range(400)] if rng.random() < 0.5 else None
    restart_s, draws = seconds(5, 60), {}

    def draw(p):
        if p not in draws:
            r = random.Random(f"{seed}/{p}")
            draws[p] = r.randint(1, 9), tuple(r.randint(1, 30) for _ in range(group_size)), r.random() < 0.6
        return draws[p]

    sizes = dict(prompts_per_step=prompts, group_size=group_size)
    simulated = Simulation(
        config.Rollout(**sizes, cache_after_refit="recompute" if recompute else "keep", **admission),
        config.Engine(num_engines=num_engines, max_running_responses=max_running),
        Cluster(
            EngineProfile(tuple(enumerate(by_n, 1)), kv, prefill, start, block, capacity),
            TrainerProfile(step_s, token_s, pair_s, refit_s),
            Lives(lives, restart_s) if lives else None,
        ),
        lambda p: Draw(*draw(p)),
    )
    engine = dict(max_running=max_running, capacity=capacity, block=block, prefill=prefill, start=start)
    return simulated, oracle.Run(
        **sizes,
        admission=admission,
        recompute=recompute,
        num_engines=num_engines,
        sizes=engine | {"iteration": lambda n, tokens: by_n[n - 1] + kv * tokens},
        train=lambda lengths: step_s + token_s * sum(lengths) + pair_s * sum(n**2 for n in lengths),
        refit_s=refit_s,
        lives=lives and list(lives),
        restart_s=restart_s,
        draw=draw,
    )


@pytest.mark.parametrize("seeds", [range(i, i + 40) for i in range(0, 400, 40)], ids=str)
def test_equals_the_oracle_that_goes_token_by_token(seeds):
    for seed in seeds:
        simulated, run = both(seed)
        steps, rows = simulated.run(6), run.steps(6)
        for s, r in zip(steps, rows, strict=True):
            assert (s.refit_s, s.rollout_s, s.train_s) == (r["refit"], r["wait"], r["train"]), seed
            assert s.positions == r["positions"], seed
            assert (s.response_tokens, s.max_staleness) == (r["tokens"], r["max_staleness"]), seed
            assert s.staleness == r["staleness"] / r["tokens"], seed
            assert (s.failures, s.issued_again, s.dropped) == (r["failures"], r["again"], r["dropped"]), seed
        assert list(accumulate(s.busy_s for s in steps)) == [r["busy"] for r in rows], seed
        assert list(accumulate(s.slots_s for s in steps)) == [r["slots"] for r in rows], seed
