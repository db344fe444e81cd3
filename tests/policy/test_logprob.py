"""Log-prob and entropy of the head without tensor parallelism: oracle, temperature, padding rows.

Not covered here: tensor-parallel shards (tests/parallel/test_vocab.py), the kernel's own precision (tests/kernels/).
"""

import math

import pytest
import torch

from grpo_mcore.policy.logprob import logprobs_and_entropy
from tests.reference import logprob as oracle

R, D, V, PADDED = 9, 8, 11, 16
# 8 products a logit, logits and entropies of a few units: some ulps (1.2e-7 relative) of 10
FLOAT32 = 5e-6


def inputs(rows: int = V):
    g = torch.Generator().manual_seed(0)
    return (
        torch.randn(R, D, generator=g),
        torch.randn(rows, D, generator=g),
        torch.tensor([0, 10, 5, 3, 3, 9, 1, 0, 10]),
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_values_and_gradients_equal_the_float64_oracles(temperature):
    hidden, weight, target = inputs()
    results = []
    for function, dtype, targets in (
        (lambda h, w, t: logprobs_and_entropy(h, w, t, temperature=temperature, vocab_size=V), torch.float32, target),
        (lambda h, w, t: oracle.logprob_and_entropy(h, w, t, temperature), torch.float64, target.tolist()),
    ):
        h, w = (x.detach().to(dtype).clone().requires_grad_() for x in (hidden, weight))
        logprob, entropy = function(h, w, targets)
        upstream = torch.arange(1, R + 1, dtype=dtype) / R
        (logprob @ upstream - 0.3 * entropy @ upstream).backward()
        results.append((logprob.detach(), entropy.detach(), h.grad, w.grad))
    for ours, truth in zip(*results, strict=True):
        assert ours.dtype == torch.float32
        assert ours.double().sub(truth).abs().max() <= FLOAT32 / min(temperature, 1)


def test_temperature_divides_the_logits_before_the_softmax():
    # Logits 0 and log 4 at temperature 2: 0 and log 2, so p = 1/3, 2/3. The other order: log(4/5) / 2 = -0.112, not
    # -0.405.
    hidden, weight = torch.ones(2, 1), torch.tensor([[0.0], [math.log(4)]])
    logprob, entropy = logprobs_and_entropy(hidden, weight, torch.tensor([0, 1]), temperature=2.0, vocab_size=2)
    assert logprob.tolist() == pytest.approx([math.log(1 / 3), math.log(2 / 3)], abs=FLOAT32)
    # log 3 / 3 + 2 (log 3 - log 2) / 3
    assert entropy.tolist() == pytest.approx([math.log(3) - 2 / 3 * math.log(2)] * 2, abs=FLOAT32)


def test_a_uniform_policy_has_the_entropy_log_V_and_a_certain_one_zero():
    hidden = torch.tensor([[0.0], [1.0]])
    weight = torch.tensor([[0.0]] * (V - 1) + [[500.0]])
    logprob, entropy = logprobs_and_entropy(hidden, weight, torch.tensor([4, V - 1]), temperature=1.0, vocab_size=V)
    assert entropy.tolist() == pytest.approx([math.log(V), 0.0], abs=FLOAT32)
    assert logprob.tolist() == pytest.approx([-math.log(V), 0.0], abs=FLOAT32)


@pytest.mark.parametrize("garbage", [1e4, -1e4, float("nan"), float("inf")])
def test_rows_that_pad_the_vocabulary_take_no_part_and_get_no_gradient(garbage):
    hidden, weight, target = inputs()
    padded = torch.full((PADDED, D), garbage)
    padded[:V] = weight
    results = []
    for w in (weight, padded):
        h, w = hidden.clone().requires_grad_(), w.clone().requires_grad_()
        logprob, entropy = logprobs_and_entropy(h, w, target, temperature=0.7, vocab_size=V)
        (logprob + 0.5 * entropy).sum().backward()
        results.append((logprob, entropy, h.grad, w.grad))
    plain, with_padding = results
    # Bit for bit: the rows are cut off, not masked.
    for a, b in zip(plain[:3], with_padding[:3], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(plain[3], with_padding[3][:V])
    assert torch.equal(with_padding[3][V:], torch.zeros(PADDED - V, D))
