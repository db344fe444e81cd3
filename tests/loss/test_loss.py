"""The GRPO loss: worked numbers of value and gradient, identities, and a float64 oracle (tests/reference/grpo.py).

Not covered here: where weights come from (test_batch.py), log-probs (test_logprob.py), invariance to ranks
(test_policy.py).
"""

import math
import random

import pytest
import torch

from grpo_mcore.config import config
from grpo_mcore.loss import loss
from grpo_mcore.types import Microbatch
from tests.reference import grpo as oracle

LN, LN2 = math.log, math.log(2)
FLOAT32 = 5e-7  # relative: a logarithm, an exp and two products in float32, each within 6e-8


def tokens(
    *, old, advantage, weight, ref=None, rollout=None, sequence=None, importance=None, dtype=torch.float32
) -> Microbatch:
    """A microbatch of which only what a loss reads is filled in. `sequence`: which one each token is of; None: all of
    one."""
    empty = torch.empty(0)
    sequence = sequence or [0] * len(old)

    def column(values):
        return None if values is None else torch.tensor(values, dtype=dtype)

    return Microbatch(
        token_ids_T=empty,
        position_ids_T=empty,
        branch_T=empty,
        cu_seqlens=empty,
        max_seqlen=0,
        num_sequences=max(sequence) + 1,
        position_R=empty,
        target_R=empty,
        sequence_R=torch.tensor(sequence),
        rollout_logprobs_R=column(rollout or old),
        index_R=empty,
        advantage_R=column(advantage),
        weight_R=column(weight),
        old_logprobs_R=column(old),
        ref_logprobs_R=column(ref),
        importance_R=column(importance),
    )


def value_and_gradient(current, batch: Microbatch, cfg: config.Loss, entropy=None):
    """(loss, its gradient, the statistics). `entropy` None: 1 of each token."""
    current_R = torch.tensor(current, dtype=batch.weight_R.dtype, requires_grad=True)
    value, stats = loss.grpo(
        current_R,
        torch.ones_like(current_R) if entropy is None else torch.tensor(entropy, dtype=current_R.dtype),
        batch,
        cfg,
    )
    value.backward()
    return value.item(), current_R.grad.tolist(), stats


CLIPS = config.Loss(clip_low=0.2, clip_high=0.28)  # ratios from 0.8 to 1.28


@pytest.mark.parametrize(
    "ratio, advantage, expected, expected_gradient, clipped",
    [
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
    ],
)
def test_clipped_surrogate_of_one_token(ratio, advantage, expected, expected_gradient, clipped):
    weight = 0.25
    value, (gradient,), stats = value_and_gradient(
        [math.log(ratio) - 3.0], tokens(old=[-3.0], advantage=[advantage], weight=[weight]), CLIPS
    )
    # -3 + log(ratio) is held to 2.4e-7 (half an ulp at 4): as much again, relative, in the ratio
    assert value == pytest.approx(weight * expected, rel=2 * FLOAT32)
    assert gradient == pytest.approx(weight * expected_gradient, rel=2 * FLOAT32)
    assert stats["clip_frac"].tolist() == [float(clipped)]
    assert stats["ratio"].item() == pytest.approx(ratio, rel=2 * FLOAT32)


def test_tokens_are_summed_with_their_weights_and_by_nothing_else():
    # ratio 1: -0.5 x 2 - 0.125 x (-4) - 0 x 8 = -0.5
    value, gradient, _ = value_and_gradient(
        [-1.0] * 3, tokens(old=[-1.0] * 3, advantage=[2.0, -4.0, 8.0], weight=[0.5, 0.125, 0.0]), CLIPS
    )
    assert value == -0.5
    assert gradient == [-1.0, 0.5, 0.0]


@pytest.mark.parametrize(
    "cfg",
    [CLIPS, config.Loss(clip_low=0.0, clip_high=0.0), config.Loss(policy_loss="cispo"), config.Loss(clip_dual=3.0)],
)
def test_on_policy_the_gradient_is_exactly_minus_weight_times_advantage(cfg):
    rng = random.Random(0)
    logprobs = [-rng.expovariate(0.5) for _ in range(50)]
    batch = tokens(old=logprobs, advantage=[rng.gauss(0, 1) for _ in logprobs], weight=[rng.random() for _ in logprobs])
    _, gradient, stats = value_and_gradient(logprobs, batch, cfg)
    assert stats["ratio"].tolist() == [1.0] * 50
    assert stats["clip_frac"].tolist() == [0.0] * 50
    # Exactly: at ratio 1 the two branches tie, and each takes half of the gradient.
    assert gradient == (-batch.weight_R * batch.advantage_R).tolist()


@pytest.mark.parametrize(
    "estimator, twice, half",
    [
        # d = log(ref / policy). ref = 2 x policy: d = log 2; ref = policy / 2: d = -log 2
        ("k1", -LN2, LN2),  # -d
        ("k2", LN2**2 / 2, LN2**2 / 2),  # d^2 / 2
        ("k3", 2 - 1 - LN2, 0.5 - 1 + LN2),  # e^d - 1 - d
    ],
)
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
    value, gradient, stats = value_and_gradient(
        [-2.0], tokens(old=[-2.0], ref=[-2.0 + LN2], advantage=[0.0], weight=[0.5]), cfg
    )
    # d is the difference of numbers near 2, each held to 1.2e-7
    assert value == pytest.approx(0.05 * (1 - LN2), rel=2e-6)
    assert gradient == pytest.approx([-0.05], rel=2e-6)
    assert stats["kl_to_ref"].item() == pytest.approx(1 - LN2, rel=2e-6)


VARIANTS = [
    {},
    {"kl_coef": 0.3, "kl_estimator": "k1"},
    {"kl_coef": 0.3, "kl_estimator": "k2"},
    {"kl_coef": 0.3, "kl_estimator": "k3"},
    {"kl_coef": 0.3, "kl_limit": 0.05},
    {"clip_dual": 1.5},
    {"entropy_coef": 0.2},
    {"policy_loss": "gspo", "clip_low": 0.05, "clip_high": 0.03},
    {"policy_loss": "gspo", "clip_low": 0.05, "clip_high": 0.03, "clip_dual": 1.1},
    {"policy_loss": "cispo"},
    {"policy_loss": "cispo", "clip_low": 1.0, "kl_coef": 0.3, "entropy_coef": 0.2},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_value_and_gradient_equal_the_float64_oracles(variant, seed):
    rng = random.Random(seed)
    cfg = config.Loss(**{"clip_low": 0.2, "clip_high": 0.28, **variant})
    kinks = [1 - cfg.clip_low, 1 + cfg.clip_high, cfg.clip_dual or 0]

    def draw():
        current, tokens = [], []
        advantages = [rng.gauss(0, 1) for _ in range(10)]
        for i in range(40):
            old = -rng.expovariate(0.7)
            current.append(old + rng.gauss(0, 0.4))
            tokens.append(
                {
                    "old": old,
                    "ref": current[-1] + rng.gauss(0, 0.5),
                    "advantage": advantages[i // 4],
                    "weight": rng.random() / 40,
                    "sequence": i // 4,
                    "importance": rng.choice([0.0, 0.5, 1.0, 2.0]),
                    "entropy": rng.expovariate(1),
                }
            )
        return current, tokens

    def is_near_a_kink(current, drawn):  # where a difference quotient has no limit
        kls = [abs(oracle.kl(c, t["ref"], cfg.kl_estimator)) for c, t in zip(current, drawn, strict=True)]
        return (
            min(abs(r - k) for r in oracle.ratios(current, drawn, cfg.policy_loss) for k in kinks) < 1e-4
            or min(abs(x - (cfg.kl_limit or 9)) for x in kls) < 1e-4
        )

    while is_near_a_kink(*(drawn := draw())):
        pass
    current, columns = drawn[0], {name: [token[name] for token in drawn[1]] for name in drawn[1][0]}
    entropy = columns.pop("entropy")
    value, gradient, stats = value_and_gradient(current, tokens(**columns, dtype=torch.float64), cfg, entropy)
    assert 0 < sum(stats["clip_frac"].tolist()) < 40
    assert cfg.clip_dual is None or 0 < sum(stats["clip_dual_frac"].tolist()) < 40

    def function(at: list[float]) -> float:
        return oracle.loss(
            at,
            drawn[1],
            low=cfg.clip_low,
            high=cfg.clip_high,
            kl_coef=cfg.kl_coef,
            estimator=cfg.kl_estimator,
            kl_limit=cfg.kl_limit or math.inf,
            policy_loss=cfg.policy_loss,
            dual=cfg.clip_dual,
            entropy_coef=cfg.entropy_coef,
            frozen=current if cfg.policy_loss == "cispo" else None,
        )

    assert value == pytest.approx(function(current), rel=1e-12)  # the same formula in float64
    # step^2 = 1e-10 times a third derivative of about weight x 3, and 1e-16 / 1e-5 of rounding
    assert gradient == pytest.approx(oracle.gradient(function, current), abs=1e-10)


# cispo's weights have no gradient by intent
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.get("policy_loss") != "cispo"], ids=str)
def test_the_gradient_is_that_of_the_value(variant):
    rng = random.Random(5)
    cfg = config.Loss(**variant)
    old = [-rng.expovariate(0.7) for _ in range(12)]
    batch = tokens(
        old=old,
        ref=[o - 0.3 for o in old],
        sequence=[0] * 5 + [1] * 7,
        advantage=[1.0] * 5 + [-0.5] * 7,
        weight=[rng.random() for _ in old],
        dtype=torch.float64,
    )
    current, entropy = (
        torch.tensor([x + rng.gauss(0, 0.3) for x in old], dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    assert torch.autograd.gradcheck(lambda *x: loss.grpo(*x, batch, cfg)[0], (current, entropy), eps=1e-7)


@pytest.mark.parametrize(
    "ratio, advantage, expected, expected_gradient, bounded",
    [
        # c = 3: where A < 0, loss = min(-min(ratio A, clip(ratio) A), 3 |A|)
        (2.0, -2.0, 4.0, 4.0, False),
        (5.0, -2.0, 6.0, 0.0, True),  # min(10, 6)
        (5.0, 2.0, -2.56, 0.0, False),  # clipped at 1.28 as ever
    ],
)
def test_dual_clip_of_one_token(ratio, advantage, expected, expected_gradient, bounded):
    cfg = config.Loss(clip_low=0.2, clip_high=0.28, clip_dual=3.0)
    value, (gradient,), stats = value_and_gradient(
        [LN(ratio) - 3.0], tokens(old=[-3.0], advantage=[advantage], weight=[0.5]), cfg
    )
    assert (value, gradient) == pytest.approx((0.5 * expected, 0.5 * expected_gradient), rel=2 * FLOAT32)
    assert stats["clip_dual_frac"].tolist() == [float(bounded)]


def test_gspo_of_two_responses():
    # Ratios 2 and 0.5 | 1.44, 1, 1.5625: geometric means 1 and (1.44 x 1.5625)^(1/3) = 2.25^(1/3) = 1.31037 > 1.28
    ratios, old = [2.0, 0.5, 1.44, 1.0, 1.5625], [-1.0, -2.0, -0.5, -3.0, -1.0]
    cfg = config.Loss(policy_loss="gspo", clip_low=0.2, clip_high=0.28, aggregation="sequence_mean")
    # 1 / (length x 2 responses)
    batch = tokens(
        old=old,
        sequence=[0, 0, 1, 1, 1],
        advantage=[2.0, 2.0, 3.0, 3.0, 3.0],
        weight=[1 / 4, 1 / 4, 1 / 6, 1 / 6, 1 / 6],
    )
    value, gradient, stats = value_and_gradient([o + LN(r) for o, r in zip(old, ratios, strict=True)], batch, cfg)
    # -(1 x 2 + 1.28 x 3) / 2 = -2.92; the first response's gradient -(1/2) x A / 2 tokens each, the second is clipped.
    assert value == pytest.approx(-2.92, rel=2 * FLOAT32)
    assert gradient == pytest.approx([-0.5, -0.5, 0.0, 0.0, 0.0], rel=2 * FLOAT32)
    assert stats["ratio"].tolist() == pytest.approx([1.0, 1.0] + [2.25 ** (1 / 3)] * 3, rel=2 * FLOAT32)
    assert stats["clip_frac"].tolist() == [0.0, 0.0, 1.0, 1.0, 1.0]


def test_gspo_on_policy_has_ratio_exactly_one_and_the_gradient_of_grpo():
    rng = random.Random(0)
    logprobs = [-rng.expovariate(0.5) for _ in range(50)]
    sequence = [min(i // 9, 4) for i in range(50)]
    advantages = [rng.gauss(0, 1) for _ in range(5)]
    batch = tokens(old=logprobs, sequence=sequence, advantage=[advantages[s] for s in sequence], weight=[1 / 50] * 50)
    _, gradient, stats = value_and_gradient(logprobs, batch, config.Loss(policy_loss="gspo"))
    assert stats["ratio"].tolist() == [1.0] * 50 and not stats["clip_frac"].any()
    assert gradient == pytest.approx((-batch.weight_R * batch.advantage_R).tolist(), rel=FLOAT32)


@pytest.mark.parametrize(
    "ratio, advantage, weight",
    [(1.1, 2.0, 1.1), (5.0, 2.0, 1.28), (5.0, -2.0, 1.28), (0.1, 2.0, 0.8), (0.1, -2.0, 0.8)],
)
def test_cispo_of_one_token_is_reinforce_with_the_clipped_ratio_as_weight(ratio, advantage, weight):
    cfg = config.Loss(policy_loss="cispo", clip_low=0.2, clip_high=0.28)
    value, (gradient,), stats = value_and_gradient(
        [LN(ratio) - 3.0], tokens(old=[-3.0], advantage=[advantage], weight=[0.25]), cfg
    )
    assert value == pytest.approx(-0.25 * weight * advantage * (LN(ratio) - 3.0), rel=2 * FLOAT32)
    assert gradient == pytest.approx(-0.25 * weight * advantage, rel=2 * FLOAT32)  # never 0: no token is dropped
    assert stats["clip_frac"].item() == float(weight != ratio)


def test_the_entropy_bonus_is_subtracted_with_its_coefficient_and_has_a_gradient():
    entropy = torch.tensor([0.5, 2.0], requires_grad=True)
    batch = tokens(old=[-1.0, -1.0], advantage=[0.0, 0.0], weight=[0.5, 0.25])
    value, _ = loss.grpo(torch.tensor([-1.0, -1.0]), entropy, batch, config.Loss(entropy_coef=0.5))
    value.backward()
    assert value.item() == -0.375  # -0.5 x (0.5 x 0.5 + 0.25 x 2)
    assert entropy.grad.tolist() == [-0.25, -0.125]


def test_a_kl_estimate_is_clamped_and_has_no_gradient_beyond():
    # d = -4 -> k1 = 4, within 10; d = -12 -> 12, clamped to 10
    cfg = config.Loss(kl_coef=0.5, kl_estimator="k1", kl_limit=10.0)
    batch = tokens(old=[-1.0] * 3, ref=[-5.0, -13.0, 11.0], advantage=[0.0] * 3, weight=[1.0] * 3)
    value, gradient, stats = value_and_gradient([-1.0] * 3, batch, cfg)
    assert stats["kl_to_ref"].tolist() == [4.0, 10.0, -10.0]
    assert value == 2.0 and gradient == [0.5, 0.0, 0.0]


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


@pytest.mark.parametrize(
    "mode, level, expected, beyond",
    [
        # exp(old - rollout) of the tokens 1.5, 3, 0.25 | 0.8, 0.5; products 1.125 and 0.4; cap 2
        ("truncate", "token", [1.5, 2.0, 0.25, 0.8, 0.5], [0, 1, 0, 0, 0]),
        ("mask", "token", [1.5, 0.0, 0.0, 0.8, 0.5], [0, 1, 1, 0, 0]),  # outside [0.5, 2]; 0.5 itself is inside
        ("truncate", "sequence", [1.125, 1.125, 1.125, 0.4, 0.4], [0, 0, 0, 0, 0]),
        ("mask", "sequence", [1.125, 1.125, 1.125, 0.0, 0.0], [0, 0, 0, 1, 1]),
    ],
)
def test_importance_weights_of_two_sequences(mode, level, expected, beyond):
    cfg = config.Loss(importance_level=level, importance_mode=mode, importance_cap=2.0)
    weights, old = [1.5, 3.0, 0.25, 0.8, 0.5], [-1.0, -2.0, -0.5, -3.0, -1.0]
    batch = tokens(
        old=old,
        rollout=[o - LN(w) for o, w in zip(old, weights, strict=True)],
        sequence=[0, 0, 0, 1, 1],
        advantage=[1.0] * 5,
        weight=[0.2] * 5,
        dtype=torch.float64,
    )
    ours, changed = loss.importance(batch, cfg)
    assert ours.dtype == torch.float32
    assert ours.tolist() == pytest.approx(expected, rel=FLOAT32)
    assert changed.tolist() == [bool(x) for x in beyond]


@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_what_the_trainer_would_have_sampled_alike_has_importance_exactly_one(mode, level):
    rng = random.Random(1)
    old = [-rng.expovariate(0.5) for _ in range(40)]
    ours, changed = loss.importance(
        tokens(old=old, sequence=[i // 7 for i in range(40)], advantage=old, weight=old),
        config.Loss(importance_level=level, importance_mode=mode),
    )
    assert ours.tolist() == [1.0] * 40 and not changed.any()


def test_a_wild_difference_has_a_finite_importance():
    batch = tokens(old=[-1.0, -2e4], rollout=[-2e4, -1.0], sequence=[0, 1], advantage=[1.0] * 2, weight=[1.0] * 2)
    for level in ("token", "sequence"):
        assert loss.importance(batch, config.Loss(importance_level=level, importance_cap=1e30))[
            0
        ].tolist() == pytest.approx([math.exp(20), math.exp(-20)], rel=1e-6)


def test_a_sequence_over_two_ranks_has_the_sum_of_both():
    # Tokens of sequence 0: 1 and 2 here, 4 there; of sequence 1: 8 there alone; sequence 2 is whole here: 16.
    here, there = (
        tokens(old=[0.0] * 3, sequence=[0, 0, 2], advantage=[0.0] * 3, weight=[0.0] * 3),
        tokens(old=[0.0] * 2, sequence=[0, 1], advantage=[0.0] * 2, weight=[0.0] * 2),
    )
    there.num_sequences = 3
    sums = []

    def note(sums_S):
        sums.append(sums_S)
        return sums_S

    for values, part in (([1.0, 2.0, 16.0], here), ([4.0, 8.0], there)):
        loss.sequence_sum(torch.tensor(values), part, note)
    assert loss.sequence_sum(torch.tensor([1.0, 2.0, 16.0]), here, lambda _: sums[0] + sums[1]).tolist() == [
        7.0,
        7.0,
        16.0,
    ]
    assert loss.sequence_sum(torch.tensor([4.0, 8.0]), there, lambda _: sums[0] + sums[1]).tolist() == [7.0, 8.0]


def test_importance_multiplies_the_surrogate_and_not_the_kl():
    # ratio 1, A = 2, importance 0.5 and 0: -0.5 x 2 x 0.25 = -0.25 and 0; KL of d = log 2: 1 - log 2 each, times 0.1 x
    # 0.25
    cfg = config.Loss(kl_coef=0.1, importance_level="token")
    batch = tokens(
        old=[-2.0, -2.0], ref=[-2.0 + LN2] * 2, advantage=[2.0, 2.0], weight=[0.25, 0.25], importance=[0.5, 0.0]
    )
    value, gradient, _ = value_and_gradient([-2.0, -2.0], batch, cfg)
    assert value == pytest.approx(-0.25 + 2 * 0.025 * (1 - LN2), rel=2e-6)
    assert gradient == pytest.approx([-0.25 - 0.025, -0.025], rel=2e-6)  # d k3 = 1 - e^d = -1


def test_supervised_is_the_weighted_negative_log_likelihood():
    current = torch.tensor([-1.0, -3.0], requires_grad=True)
    value, _ = loss.supervised(
        current, torch.zeros(2), tokens(old=[0.0, 0.0], advantage=[7.0, 7.0], weight=[0.25, 0.5])
    )
    value.backward()
    assert value.item() == 1.75  # 0.25 x 1 + 0.5 x 3
    assert current.grad.tolist() == [-0.25, -0.5]
