"""The GRPO loss: worked numbers of value and gradient, identities, and a float64 oracle (tests/reference/grpo.py).

Not covered here: where weights come from (test_batch.py), log-probs (test_logprob.py), invariance to ranks (test_policy.py).
"""

import math
import random

import pytest
import torch

from grpo_mcore import config, loss
from grpo_mcore.types import Microbatch
from tests.reference import grpo as oracle

LN2 = math.log(2)
FLOAT32 = 5e-7  # relative: a logarithm, an exp and two products in float32, each within 6e-8


def tokens(*, old, advantage, weight, ref=None, rollout=None, sequence=None, importance=None, dtype=torch.float32) -> Microbatch:
    """A microbatch of which only what a loss reads is filled in. `sequence`: which one each token is of; None: all of one."""
    empty = torch.empty(0)
    sequence = sequence or [0] * len(old)

    def column(values):
        return None if values is None else torch.tensor(values, dtype=dtype)

    return Microbatch(
        token_ids_T=empty, position_ids_T=empty, branch_T=empty, cu_seqlens=empty, max_seqlen=0, num_sequences=max(sequence) + 1, position_R=empty, target_R=empty,
        sequence_R=torch.tensor(sequence), rollout_logprobs_R=column(rollout or old), index_R=empty, advantage_R=column(advantage), weight_R=column(weight),
        old_logprobs_R=column(old), ref_logprobs_R=column(ref), importance_R=column(importance))


def value_and_gradient(current, batch: Microbatch, cfg: config.Loss):
    """(loss, its gradient, the statistics)."""
    current_R = torch.tensor(current, dtype=batch.weight_R.dtype, requires_grad=True)
    value, stats = loss.grpo(current_R, batch, cfg)
    value.backward()
    return value.item(), current_R.grad.tolist(), stats


CLIPS = config.Loss(clip_low=0.2, clip_high=0.28)  # ratios from 0.8 to 1.28


@pytest.mark.parametrize("ratio, advantage, expected, expected_gradient, clipped", [
    # loss = -min(ratio A, clip(ratio) A); where the minimum is the first, d loss / d logprob = -ratio A, else 0
    (0.5, 2.0, -1.0, -1.0, False),  # -min(1.0, 1.6)
    (0.9, 2.0, -1.8, -1.8, False),  # within both clips
    (1.25, 2.0, -2.5, -2.5, False),  # within: the upper clip is 1.28, not 1.2
    (1.5, 2.0, -2.56, 0.0, True),  # -min(3.0, 2.56): rewarded enough already
    (0.5, -2.0, 1.6, 0.0, True),  # -min(-1.0, -1.6): punished enough already
    (0.75, -2.0, 1.6, 0.0, True),  # -min(-1.5, -1.6): the lower clip is 0.8, not 0.72
    (0.9, -2.0, 1.8, 1.8, False),
    (1.5, -2.0, 3.0, 3.0, False),  # -min(-3.0, -2.56)
    (1.5, 0.0, 0.0, 0.0, False),
])
def test_clipped_surrogate_of_one_token(ratio, advantage, expected, expected_gradient, clipped):
    weight = 0.25
    value, (gradient,), stats = value_and_gradient([math.log(ratio) - 3.0], tokens(old=[-3.0], advantage=[advantage], weight=[weight]), CLIPS)
    # -3 + log(ratio) is held to 2.4e-7 (half an ulp at 4): as much again, relative, in the ratio
    assert value == pytest.approx(weight * expected, rel=2 * FLOAT32)
    assert gradient == pytest.approx(weight * expected_gradient, rel=2 * FLOAT32)
    assert stats["clip_frac"].tolist() == [float(clipped)]
    assert stats["ratio"].item() == pytest.approx(ratio, rel=2 * FLOAT32)


def test_tokens_are_summed_with_their_weights_and_by_nothing_else():
    # ratio 1: -0.5 x 2 - 0.125 x (-4) - 0 x 8 = -0.5
    value, gradient, _ = value_and_gradient([-1.0] * 3, tokens(old=[-1.0] * 3, advantage=[2.0, -4.0, 8.0], weight=[0.5, 0.125, 0.0]), CLIPS)
    assert value == -0.5
    assert gradient == [-1.0, 0.5, 0.0]


@pytest.mark.parametrize("cfg", [CLIPS, config.Loss(clip_low=0.0, clip_high=0.0)])
def test_on_policy_the_gradient_is_exactly_minus_weight_times_advantage(cfg):
    rng = random.Random(0)
    logprobs = [-rng.expovariate(0.5) for _ in range(50)]
    batch = tokens(old=logprobs, advantage=[rng.gauss(0, 1) for _ in logprobs], weight=[rng.random() for _ in logprobs])
    _, gradient, stats = value_and_gradient(logprobs, batch, cfg)
    assert stats["ratio"].tolist() == [1.0] * 50
    assert stats["clip_frac"].tolist() == [0.0] * 50
    # Exactly: at ratio 1 the two branches tie, and each takes half of the gradient.
    assert gradient == (-batch.weight_R * batch.advantage_R).tolist()


@pytest.mark.parametrize("estimator, twice, half", [
    # d = log(ref / policy). ref = 2 x policy: d = log 2; ref = policy / 2: d = -log 2
    ("k1", -LN2, LN2),  # -d
    ("k2", LN2**2 / 2, LN2**2 / 2),  # d^2 / 2
    ("k3", 2 - 1 - LN2, 0.5 - 1 + LN2),  # e^d - 1 - d
])
def test_kl_of_one_token(estimator, twice, half):
    current = torch.tensor([-2.0, -2.0])
    ref = torch.tensor([-2.0 + LN2, -2.0 - LN2])
    # 2 +- log 2 is held to 1.2e-7 absolute
    assert loss.kl_to_ref(current, ref, estimator).tolist() == pytest.approx([twice, half], rel=FLOAT32, abs=3e-7)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_against_itself_is_exactly_zero(estimator):
    logprobs = torch.tensor([-1e-3, -0.7, -3.3, -80.0])
    assert loss.kl_to_ref(logprobs, logprobs.clone(), estimator).tolist() == [0.0] * 4


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_is_in_expectation_over_the_policy_that_from_policy_to_reference(estimator):
    policy, ref = torch.tensor([[0.7, 0.2, 0.1], [0.25, 0.25, 0.5]], dtype=torch.float64)
    expectation = (policy * loss.kl_to_ref(policy.log(), ref.log(), estimator)).sum().item()
    forward, reverse = (policy * (policy / ref).log()).sum().item(), (ref * (ref / policy).log()).sum().item()
    assert expectation == pytest.approx(forward, rel=1e-12)
    assert abs(forward - reverse) > 0.05  # the other direction would show


def test_kl_is_added_with_its_coefficient_and_weights():
    # A = 0 leaves 0.5 x 0.1 x k3 with d = log 2: 1 - log 2; d k3 / d logprob = 1 - e^d = -1
    cfg = config.Loss(kl_coef=0.1, kl_estimator="k3")
    value, gradient, stats = value_and_gradient([-2.0], tokens(old=[-2.0], ref=[-2.0 + LN2], advantage=[0.0], weight=[0.5]), cfg)
    # d is the difference of numbers near 2, each held to 1.2e-7
    assert value == pytest.approx(0.05 * (1 - LN2), rel=2e-6)
    assert gradient == pytest.approx([-0.05], rel=2e-6)
    assert stats["kl_to_ref"].item() == pytest.approx(1 - LN2, rel=2e-6)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_value_and_gradient_equal_the_float64_oracles(estimator, kl_coef, seed):
    rng = random.Random(seed)
    low, high = 0.2, 0.28
    current, drawn = [], []
    while len(drawn) < 40:
        old, change = -rng.expovariate(0.7), rng.gauss(0, 0.4)
        if min(abs(math.exp(change) - (1 - low)), abs(math.exp(change) - (1 + high))) < 1e-3:
            continue  # at a kink a difference quotient has no limit
        current.append(old + change)
        drawn.append({"old": old, "ref": old + rng.gauss(0, 0.5), "advantage": rng.gauss(0, 1), "weight": rng.random() / 40})
    columns = {name: [token[name] for token in drawn] for name in drawn[0]}
    cfg = config.Loss(clip_low=low, clip_high=high, kl_coef=kl_coef, kl_estimator=estimator)
    value, gradient, stats = value_and_gradient(current, tokens(**columns, dtype=torch.float64), cfg)
    assert 0 < sum(stats["clip_frac"].tolist()) < 40

    def function(at: list[float]) -> float:
        return oracle.loss(at, drawn, low=low, high=high, kl_coef=kl_coef, estimator=estimator)

    assert value == pytest.approx(function(current), rel=1e-12)  # the same formula in float64
    # step^2 = 1e-10 times a third derivative of about weight x 3, and 1e-16 / 1e-5 of rounding
    assert gradient == pytest.approx(oracle.gradient(function, current), abs=1e-10)


@pytest.mark.parametrize("wild", [1e4, -1e4])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_a_wild_log_ratio_gives_a_finite_loss_and_leaves_other_tokens_gradients_alone(wild, advantage, estimator):
    cfg = config.Loss(clip_low=0.2, clip_high=0.2, kl_coef=0.1, kl_estimator=estimator)
    batch = tokens(old=[-1.0 - wild, -1.0], ref=[-1.0 - wild, -1.0], advantage=[advantage] * 2, weight=[0.5, 0.5])
    value, gradient, _ = value_and_gradient([-1.0, -1.0], batch, cfg)
    # The exponents are held to 20: ratio e^20 or e^-20. d of the KL is the opposite.
    surrogate = -min(math.exp(math.copysign(20, wild)) * advantage, (1.2 if wild > 0 else 0.8) * advantage)
    d = -math.copysign(20, wild)
    kl = {"k1": -d, "k2": 200.0, "k3": math.exp(d) - 1 - d}[estimator]
    assert value == pytest.approx(0.5 * (surrogate + 0.1 * kl - advantage), rel=1e-6)
    # k1 has a gradient of 1 wherever it is; k2 and k3 of 0 where policy and reference agree
    assert gradient == pytest.approx([0.0, 0.5 * (-advantage + (0.1 if estimator == "k1" else 0.0))], rel=1e-6)


LN = math.log


@pytest.mark.parametrize("mode, level, expected, beyond", [
    # exp(old - rollout) of the tokens 1.5, 3, 0.25 | 0.8, 0.5; products 1.125 and 0.4; cap 2
    ("truncate", "token", [1.5, 2.0, 0.25, 0.8, 0.5], [0, 1, 0, 0, 0]),
    ("mask", "token", [1.5, 0.0, 0.0, 0.8, 0.5], [0, 1, 1, 0, 0]),  # outside [0.5, 2]; 0.5 itself is inside
    ("truncate", "sequence", [1.125, 1.125, 1.125, 0.4, 0.4], [0, 0, 0, 0, 0]),
    ("mask", "sequence", [1.125, 1.125, 1.125, 0.0, 0.0], [0, 0, 0, 1, 1]),
])
def test_importance_weights_of_two_sequences(mode, level, expected, beyond):
    cfg = config.Loss(importance_level=level, importance_mode=mode, importance_cap=2.0)
    weights, old = [1.5, 3.0, 0.25, 0.8, 0.5], [-1.0, -2.0, -0.5, -3.0, -1.0]
    batch = tokens(old=old, rollout=[o - LN(w) for o, w in zip(old, weights)], sequence=[0, 0, 0, 1, 1], advantage=[1.0] * 5, weight=[0.2] * 5, dtype=torch.float64)
    ours, changed = loss.importance(batch, cfg)
    assert ours.dtype == torch.float32
    assert ours.tolist() == pytest.approx(expected, rel=FLOAT32)
    assert changed.tolist() == [bool(x) for x in beyond]


@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_what_the_trainer_would_have_sampled_alike_has_importance_exactly_one(mode, level):
    rng = random.Random(1)
    old = [-rng.expovariate(0.5) for _ in range(40)]
    ours, changed = loss.importance(tokens(old=old, sequence=[i // 7 for i in range(40)], advantage=old, weight=old), config.Loss(importance_level=level, importance_mode=mode))
    assert ours.tolist() == [1.0] * 40 and not changed.any()


def test_a_wild_difference_has_a_finite_importance():
    batch = tokens(old=[-1.0, -2e4], rollout=[-2e4, -1.0], sequence=[0, 1], advantage=[1.0] * 2, weight=[1.0] * 2)
    for level in ("token", "sequence"):
        assert loss.importance(batch, config.Loss(importance_level=level, importance_cap=1e30))[0].tolist() == pytest.approx([math.exp(20), math.exp(-20)], rel=1e-6)


def test_a_sequence_over_two_ranks_has_the_sum_of_both():
    # Tokens of sequence 0: 1 and 2 here, 4 there; of sequence 1: 8 there alone; sequence 2 is whole here: 16.
    here, there = tokens(old=[0.0] * 3, sequence=[0, 0, 2], advantage=[0.0] * 3, weight=[0.0] * 3), tokens(old=[0.0] * 2, sequence=[0, 1], advantage=[0.0] * 2, weight=[0.0] * 2)
    there.num_sequences = 3
    sums = []

    def note(sums_S):
        sums.append(sums_S)
        return sums_S

    for values, part in (([1.0, 2.0, 16.0], here), ([4.0, 8.0], there)):
        loss.sequence_sum(torch.tensor(values), part, note)
    assert loss.sequence_sum(torch.tensor([1.0, 2.0, 16.0]), here, lambda _: sums[0] + sums[1]).tolist() == [7.0, 7.0, 16.0]
    assert loss.sequence_sum(torch.tensor([4.0, 8.0]), there, lambda _: sums[0] + sums[1]).tolist() == [7.0, 8.0]


def test_importance_multiplies_the_surrogate_and_not_the_kl():
    # ratio 1, A = 2, importance 0.5 and 0: -0.5 x 2 x 0.25 = -0.25 and 0; KL of d = log 2: 1 - log 2 each, times 0.1 x 0.25
    cfg = config.Loss(kl_coef=0.1, importance_level="token")
    batch = tokens(old=[-2.0, -2.0], ref=[-2.0 + LN2] * 2, advantage=[2.0, 2.0], weight=[0.25, 0.25], importance=[0.5, 0.0])
    value, gradient, _ = value_and_gradient([-2.0, -2.0], batch, cfg)
    assert value == pytest.approx(-0.25 + 2 * 0.025 * (1 - LN2), rel=2e-6)
    assert gradient == pytest.approx([-0.25 - 0.025, -0.025], rel=2e-6)  # d k3 = 1 - e^d = -1


def test_supervised_is_the_weighted_negative_log_likelihood():
    current = torch.tensor([-1.0, -3.0], requires_grad=True)
    value, _ = loss.supervised(current, tokens(old=[0.0, 0.0], advantage=[7.0, 7.0], weight=[0.25, 0.5]))
    value.backward()
    assert value.item() == 1.75  # 0.25 x 1 + 0.5 x 3
    assert current.grad.tolist() == [-0.25, -0.5]
