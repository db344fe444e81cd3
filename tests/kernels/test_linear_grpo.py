"""The update's head, which takes its loss's gradients with its log-probs: against autograd in float64 for every option
of the loss, and against the present head (reference.linear_logprob) in float32 and bfloat16.

Not covered here: the policy that uses it (tests/policy/test_policy.py), speed and memory (benchmarks/kernels.py).
"""

from itertools import pairwise

import pytest
import torch

from grpo_mcore.config import config
from grpo_mcore.kernels import linear_grpo as kernel, reference
from grpo_mcore.kernels.linear_grpo import linear_grpo, row_chunks
from grpo_mcore.loss import loss
from grpo_mcore.types import Microbatch

R, D, V = 29, 16, 37  # odd on purpose
ULP = 2.0**-23  # float32, relative

VARIANTS = [
    {"policy_loss": policy_loss, **kl, **entropy, **dual}
    for policy_loss, dual in (("ppo_clip", {}), ("ppo_clip", {"clip_dual": 1.2}), ("cispo", {}))
    for kl in (
        {},
        {"kl_coef": 0.3, "kl_estimator": "k1"},
        {"kl_coef": 0.3, "kl_estimator": "k2"},
        {"kl_coef": 0.3, "kl_estimator": "k3"},
        {"kl_coef": 0.3, "kl_estimator": "k3", "kl_limit": 0.05},
    )
    for entropy in ({}, {"entropy_coef": 0.2})
]


def inputs(dtype=torch.float64, rows: int = R, device: str = "cpu"):
    """hidden, weight (logits with a standard deviation of about 3) and targets, both ends of the vocabulary too."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, D, generator=g, dtype=torch.float64)
    weight = torch.randn(V, D, generator=g, dtype=torch.float64) * 0.75
    target = torch.randint(0, V, (rows,), generator=g)
    target[:2] = torch.tensor([0, V - 1])
    return hidden.to(device, dtype), weight.to(device, dtype), target.to(device)


def microbatch(logprob: torch.Tensor, importance: bool, dtype=torch.float64) -> Microbatch:
    """Old and reference log-probs so far from `logprob` that some tokens are clipped; some weights are 0."""
    g = torch.Generator().manual_seed(1)
    n, empty = len(logprob), torch.empty(0)

    def noise(size: float) -> torch.Tensor:
        return size * torch.randn(n, generator=g, dtype=torch.float64)

    of_token = {
        "advantage_R": noise(1),
        "weight_R": torch.rand(n, generator=g, dtype=torch.float64) / n * (torch.arange(n) % 5 > 0),
        "old_logprobs_R": logprob.double().cpu() + noise(0.3),
        "ref_logprobs_R": logprob.double().cpu() + noise(0.4),
        "rollout_logprobs_R": logprob.double().cpu(),
        "importance_R": 2 * torch.rand(n, generator=g, dtype=torch.float64) if importance else None,
    }
    return Microbatch(
        **dict.fromkeys(("token_ids_T", "position_ids_T", "branch_T", "cu_seqlens", "position_R", "target_R"), empty),
        sequence_R=torch.arange(n) // 4,
        index_R=torch.arange(n),
        max_seqlen=0,
        num_sequences=n // 4 + 1,
        **{name: None if x is None else x.to(logprob.device, dtype) for name, x in of_token.items()},
    )


def ours(hidden, weight, target, batch, cfg, *, upstream: float = 1.0, **how):
    """(loss, logprob, entropy, gradients of hidden and weight)"""
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()

    def of_rows(logprob, entropy, rows):
        return loss.grpo(logprob, entropy, loss.of_rows(batch, rows), cfg)[0]

    value, logprob, entropy = linear_grpo(h, w, target, of_rows, temperature=0.7, **how)
    (upstream * value).backward()
    return value.detach(), logprob, entropy, h.grad, w.grad


def naive(hidden, weight, target, batch, cfg, upstream: float = 1.0):
    """The same by autograd, from all logits."""
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    log_p = (h @ w.T / 0.7).log_softmax(1)
    logprob, entropy = log_p.gather(1, target[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)
    value = loss.grpo(logprob, entropy, batch, cfg)[0]
    (upstream * value).backward()
    return value.detach(), logprob.detach(), entropy.detach(), h.grad, w.grad


def present(hidden, weight, target, batch, cfg, **how):
    """The same by the head that computes its logits twice."""
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logsumexp, at_target, mean = reference.linear_logprob(h, w, target, temperature=0.7, **how)
    logprob, entropy = at_target - logsumexp, logsumexp - mean
    value = loss.grpo(logprob, entropy, batch, cfg)[0]
    value.backward()
    return value.detach(), logprob.detach(), entropy.detach(), h.grad, w.grad


@pytest.mark.parametrize("importance", [False, True])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_option_of_the_loss_is_autograds_in_float64(variant, importance):
    cfg = config.Loss(**{"clip_low": 0.2, "clip_high": 0.28, **variant})
    hidden, weight, target = inputs()
    batch = microbatch((hidden @ weight.T / 0.7).log_softmax(1).gather(1, target[:, None])[:, 0], importance)
    exact = naive(hidden, weight, target, batch, cfg, upstream=1.5)
    stats = loss.grpo(exact[1], exact[2], batch, cfg)[1]
    assert 0 < stats["clip_frac"].sum() < R
    assert cfg.clip_dual is None or 0 < stats["clip_dual_frac"].sum() < R
    # 5 chunks of rows of up to 6, and 4 blocks of columns.
    got = ours(hidden, weight, target, batch, cfg, upstream=1.5, workspace_bytes=6 * V * 8, columns=11)
    for mine, true in zip(got, exact, strict=True):
        assert mine.dtype == torch.float64
        # Sums of 37 exponentials, 16 products and 29 rows, of logits of up to 15.
        assert (mine - true).abs().max() <= 1e-13 * max(true.abs().max(), 1)


@pytest.mark.parametrize("rows", [1, 6, R])
@pytest.mark.parametrize("columns", [1, 11, V, V + 5])
def test_chunks_of_rows_and_blocks_of_columns_change_the_order_of_sums_alone(rows, columns):
    cfg = config.Loss(kl_coef=0.1, entropy_coef=0.1)
    hidden, weight, target = inputs()
    batch = microbatch((hidden @ weight.T / 0.7).log_softmax(1).gather(1, target[:, None])[:, 0], False)
    got = ours(hidden, weight, target, batch, cfg, workspace_bytes=rows * V * 8, columns=columns)
    for mine, true in zip(got, naive(hidden, weight, target, batch, cfg), strict=True):
        assert (mine - true).abs().max() <= 1e-13 * max(true.abs().max(), 1)


@pytest.mark.parametrize("rows", [6, R])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.2])
def test_in_float32_it_equals_the_head_that_computes_logits_twice(rows, entropy_coef):
    cfg = config.Loss(kl_coef=0.1, entropy_coef=entropy_coef)
    hidden, weight, target = inputs(torch.float32)
    batch = microbatch((hidden @ weight.T / 0.7).log_softmax(1).gather(1, target[:, None])[:, 0], True, torch.float32)
    other = present(hidden, weight, target, batch, cfg, chunk_V=11)
    got = ours(hidden, weight, target, batch, cfg, workspace_bytes=rows * V * 4, columns=11)
    noise = 16 * ULP * (hidden @ weight.T / 0.7).abs().max()  # of exp, see test_reference.py; twice, for both have it
    for mine, theirs in zip(got, other, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - theirs).abs().max() <= noise * max(theirs.abs().max(), 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [6, R])
def test_log_probs_are_those_of_the_plain_head_bit_for_bit_and_scoring_gives_the_same(dtype, rows):
    hidden, weight, target = inputs(dtype)
    how = {"temperature": 0.7, "workspace_bytes": rows * V * 4, "columns": 11}
    parts = [
        reference.linear_logprob(hidden[c], weight, target[c], temperature=0.7, chunk_V=11)
        for c in row_chunks(R, V, 4, rows * V * 4)
    ]
    logsumexp, at_target, mean = map(torch.cat, zip(*parts, strict=True))
    learning = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    for h, w, of_loss in ((hidden, weight, None), (*learning, lambda logprob, entropy, rows: logprob.sum())):
        value, logprob, entropy = linear_grpo(h, w, target, of_loss, **how)
        assert torch.equal(logprob, at_target - logsumexp) and torch.equal(entropy, logsumexp - mean)
        assert (value is None) == (of_loss is None) and not logprob.requires_grad and not entropy.requires_grad


@pytest.mark.parametrize("rows", [6, R])
def test_bfloat16_errs_as_little_as_the_head_that_computes_logits_twice(rows):
    cfg = config.Loss(entropy_coef=0.2)
    hidden, weight, target = inputs(torch.bfloat16)
    exact_inputs = hidden.double(), weight.double(), target
    logprob = (exact_inputs[0] @ exact_inputs[1].T / 0.7).log_softmax(1).gather(1, target[:, None])[:, 0]
    batch = microbatch(logprob, False, torch.float32)
    exact = naive(*exact_inputs, microbatch(logprob, False), cfg)
    got = ours(hidden, weight, target, batch, cfg, workspace_bytes=rows * V * 4, columns=11)
    assert got[3].dtype == got[4].dtype == torch.bfloat16
    for mine, other, true in zip(got, present(hidden, weight, target, batch, cfg, chunk_V=11), exact, strict=True):
        # Both round logits, dz and results alike; the products of several chunks are rounded once more.
        assert (mine - true).abs().mean() <= 1.1 * (other - true).abs().mean() + 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [6, R])
def test_main_grad_is_added_to_in_float32_and_nothing_is_returned(dtype, rows):
    cfg = config.Loss()
    hidden, weight, target = inputs(dtype)
    logprob = linear_grpo(hidden, weight, target, None, temperature=0.7)[1]
    batch = microbatch(logprob, False, torch.float32)
    how = {"workspace_bytes": rows * V * 4, "columns": 11}
    plain = ours(hidden, weight, target, batch, cfg, **how)
    main_grad = torch.full((V, D), 0.5)
    for _ in range(2):  # two microbatches
        got = ours(hidden, weight, target, batch, cfg, main_grad_VD=main_grad, **how)
        assert got[4] is None and torch.equal(got[3], plain[3])
    ulp = 2.0**-8 if dtype == torch.bfloat16 else ULP
    assert (main_grad - 0.5 - 2 * plain[4]).abs().max() <= 4 * ulp * plain[4].abs().max() + 4 * ULP


def test_what_is_in_main_grad_is_not_scaled_in_silence():
    hidden, weight, target = inputs(torch.float32)
    h = hidden.requires_grad_()
    value, _, _ = linear_grpo(
        h, weight, target, lambda logprob, *_: logprob.sum(), temperature=1.0, main_grad_VD=torch.zeros(V, D)
    )
    with pytest.raises(RuntimeError):
        (2 * value).backward()


def test_a_loss_without_log_probs_or_without_entropy_has_the_other_ones_gradient():
    hidden, weight, target = inputs()
    for of_loss, exact in (
        (lambda logprob, entropy, rows: entropy.sum(), lambda log_p: -(log_p.exp() * log_p).sum()),
        (lambda logprob, entropy, rows: logprob.sum(), lambda log_p: log_p.gather(1, target[:, None]).sum()),
    ):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        linear_grpo(h, w, target, of_loss, temperature=0.7, columns=11)[0].backward()
        h2, w2 = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        exact((h2 @ w2.T / 0.7).log_softmax(1)).backward()
        assert (h.grad - h2.grad).abs().max() <= 1e-13 * h2.grad.abs().max()
        assert (w.grad - w2.grad).abs().max() <= 1e-13 * w2.grad.abs().max()


def test_no_rows_have_a_loss_of_zero_and_no_gradient():
    hidden, weight, target = inputs()
    batch = microbatch(torch.zeros(0, dtype=torch.float64), False)
    value, logprob, entropy, d_hidden, d_weight = ours(hidden[:0], weight, target[:0], batch, config.Loss())
    assert value == 0 and logprob.shape == entropy.shape == (0,)
    assert d_hidden.shape == (0, D) and not d_weight.any()


@pytest.mark.parametrize("logits", [[1e4, -1e4, 0.0, 3.0], [-1e4, 1e4, 0.0, 1e4], [-1e4] * 4], ids=str)
def test_extreme_logits_give_finite_and_right_gradients(logits):
    hidden, weight, target = torch.ones(4, 1), torch.tensor(logits)[:, None], torch.arange(4)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    linear_grpo(h, w, target, lambda lp, entropy, rows: (lp - 0.5 * entropy).sum(), temperature=1.0)[0].backward()
    h2, w2 = hidden.double().requires_grad_(), weight.double().requires_grad_()
    log_p = (h2 @ w2.T).log_softmax(1)
    (log_p.gather(1, target[:, None]).sum() + 0.5 * (log_p.exp() * log_p).sum()).backward()
    ulp = ULP * 1e4  # of the largest logit, which z - mean carries; see test_reference.py
    assert (w.grad - w2.grad).abs().max() <= 4 * 2 * ulp
    assert (h.grad - h2.grad).abs().max() <= 4 * 2 * ulp * 1e4


def test_rows_are_cut_as_equally_as_can_be():
    # 1,365 rows of 49,152 float32 logits fit 256 MiB: 3,000 rows are three chunks of 1,000.
    assert row_chunks(3000, 49152, 4, 256 << 20) == [slice(0, 1000), slice(1000, 2000), slice(2000, 3000)]
    assert row_chunks(5, 10, 4, 80) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert row_chunks(2, 10, 4, 1) == [slice(0, 1), slice(1, 2)]  # less than a row: a row
    assert row_chunks(0, 10, 4, 1) == [slice(0, 0)]
    # On a GPU 151,936 logits of 2,048 rows fit, float32, and their gradient in bfloat16.
    assert row_chunks(24576, 151936, 6, kernel.WORKSPACE_BYTES["cuda"])[0] == slice(0, 2048)


def test_a_scoring_pass_adds_nothing_to_main_grad_and_makes_no_gradient():
    hidden, weight, target = (x.requires_grad_() if x.is_floating_point() else x for x in inputs(torch.float32))
    main_grad = torch.zeros(V, D)
    with torch.no_grad():
        for of_loss in (None, lambda logprob, entropy, rows: logprob.sum()):
            out = linear_grpo(hidden, weight, target, of_loss, temperature=1.0, main_grad_VD=main_grad)
            assert not any(x.requires_grad for x in out if x is not None)
    assert not main_grad.any()


@pytest.mark.parametrize("edges", [(0, 20, V), (0, 1, V, V)], ids=["two shards", "three, the last one empty"])
def test_shards_of_a_vocabulary_have_the_gradients_of_the_whole_one(edges):
    """One after the other, with the statistics that a first pass over all of them has gathered."""
    cfg = config.Loss(kl_coef=0.1, entropy_coef=0.1)
    hidden, weight, target = inputs()
    batch = microbatch((hidden @ weight.T / 0.7).log_softmax(1).gather(1, target[:, None])[:, 0], False)
    exact = naive(hidden, weight, target, batch, cfg)
    shards = [slice(*ends) for ends in pairwise(edges)]
    how = {"workspace_bytes": 6 * 20 * 8, "columns": 11, "rows_V": 20}  # of the largest: chunks of 6 rows
    gathered: list[list[torch.Tensor]] = []

    def note(*partials):
        gathered[-1].append(torch.stack(partials))
        return partials

    for shard in shards:
        gathered.append([])
        linear_grpo(hidden, weight[shard], target - shard.start, None, temperature=0.7, of_shards=note, **how)
    assert {len(chunks) for chunks in gathered} == {5}
    d_hidden = torch.zeros_like(hidden)
    for shard in shards:
        chunks = iter(torch.stack(chunk) for chunk in zip(*gathered, strict=True))

        def of_shards(*_, chunks=chunks):
            logsumexp_K, target_K, mean_K = next(chunks).unbind(1)
            return logsumexp_K.logsumexp(0), target_K.sum(0), (logsumexp_K.softmax(0) * mean_K).sum(0)

        got = ours(hidden, weight[shard], target - shard.start, batch, cfg, of_shards=of_shards, **how)
        for mine, true in zip((*got[:3], got[4]), (*exact[:3], exact[4][shard]), strict=True):
            assert not true.numel() or (mine - true).abs().max() <= 1e-13 * max(true.abs().max(), 1)
        d_hidden += got[3]
    assert (d_hidden - exact[3]).abs().max() <= 1e-13 * exact[3].abs().max()
