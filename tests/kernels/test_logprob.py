"""Triton's logprob of given logits against the float64 oracle: by the interpreter on a CPU
(tests/kernels/test_interpreter.py runs this file), on a GPU as it is, there also with more logits than 32 bits
count."""

import os

import pytest
import torch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("tests/kernels/test_interpreter.py runs this file", allow_module_level=True)

from grpo_mcore.kernels import logprob as kernel, reference
from tests.reference import logprob as oracle

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OUTPUTS = ("logsumexp", "target", "mean_logit")
T = 9


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(kernel, "BLOCK_V", 64)


def inputs(V: int, dtype=torch.float32, rows: int = T):
    g = torch.Generator().manual_seed(0)
    target = torch.tensor([0, V - 1, 63, 64, V, V + 1, -1, -V, V // 2])[:rows]
    upstream = {name: torch.randn(rows, generator=g) for name in OUTPUTS}
    return (torch.randn(rows, V, generator=g) * 3).to(dtype), target, upstream


def differentiate(function, logits, upstream):
    """(the three outputs, the logits' gradient) for sum over outputs of upstream * output."""
    leaf = logits.clone().requires_grad_()
    outputs = dict(zip(OUTPUTS, function(leaf * 1), strict=True))
    sum((upstream[name].to(outputs[name]) * outputs[name]).sum() for name in upstream).backward()
    return {name: x.detach().cpu() for name, x in outputs.items()}, leaf.grad.cpu()


def ours(logits, target, upstream, temperature: float, in_place: bool = False):
    return differentiate(
        lambda z: kernel.logprob(z, target.to(DEVICE), temperature=temperature, in_place=in_place),
        logits.to(DEVICE),
        upstream,
    )


def truth(logits, target, upstream, temperature: float):
    """The oracle's: its hidden states are the logits, its weight is the identity."""
    one = torch.eye(logits.shape[1], dtype=torch.float64)
    return differentiate(lambda z: oracle.partials(z, one, target.tolist(), temperature), logits.double(), upstream)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("V", [1, 37, 64, 129])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 2.0])
def test_float32_values_and_gradients_equal_the_float64_oracles(V, temperature, in_place):
    logits, target, upstream = inputs(V)
    values, gradient = ours(logits, target, upstream, temperature, in_place)
    true_values, true_gradient = truth(logits, target, upstream, temperature)
    # Some ulp of the largest logit: its factor log2(e) / temperature, the product with it, the logsumexp, the way back;
    # a few for sums.
    tolerance = 8 * 2.0**-23 * max(logits.abs().max() / temperature, 1)
    for name in OUTPUTS:
        assert values[name].dtype == torch.float32
        assert (values[name].double() - true_values[name]).abs().max() <= tolerance, name
    assert (gradient.double() - true_gradient).abs().max() <= tolerance * max(
        true_gradient.abs().max(), 1 / temperature
    )


@pytest.mark.parametrize("in_place", [False, True])
def test_bfloat16_errs_by_no_more_than_the_rounding_of_the_gradient(in_place):
    logits, target, upstream = inputs(129, torch.bfloat16)
    values, gradient = ours(logits, target, upstream, 0.7, in_place)
    true_values, true_gradient = truth(logits, target, upstream, 0.7)
    noise = 8 * 2.0**-23 * logits.abs().max().item() / 0.7
    for name in OUTPUTS:
        assert (values[name].double() - true_values[name]).abs().max() <= noise, name
    assert gradient.dtype == torch.bfloat16
    rounding = 2.0**-8 if DEVICE == "cuda" else 2.0**-7  # the interpreter cuts off
    assert ((gradient.double() - true_gradient).abs() <= rounding * true_gradient.abs() + noise).all()


@pytest.mark.parametrize(
    "row", [[1e4, -1e4, 0.0, 3.0], [-1e4, 0.0, 3.0, 1e4], [-1e4, 1e4, 0.0, 1e4], [-1e4] * 4], ids=str
)
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_extreme_logits_give_finite_and_right_values_and_gradients(row, temperature):
    logits = torch.full((4, 132), -1e4)
    logits[:, [0, 1, 64, 131]] = torch.tensor(row)
    target, upstream = torch.tensor([0, 1, 64, 131]), {name: torch.tensor([1.0, -0.5, 2.0, 0.25]) for name in OUTPUTS}
    values, gradient = ours(logits, target, upstream, temperature)
    true_values, true_gradient = truth(logits, target, upstream, temperature)
    ulps = 2 * 2.0**-23 * 1e4 / temperature  # of the largest logit, as in tests/kernels/test_linear_logprob.py
    for name in OUTPUTS:
        assert (values[name].double() - true_values[name]).abs().max() <= ulps, name
    assert (gradient.double() - true_gradient).abs().max() <= 2 * 2 * ulps / temperature


def test_in_place_the_gradient_is_the_logits_memory_and_a_second_backward_is_refused():
    logits, target, upstream = inputs(129)
    z = (logits.to(DEVICE).requires_grad_() * 1).detach().requires_grad_()
    memory = z.data_ptr()
    out = kernel.logprob(z, target.to(DEVICE), temperature=1.0, in_place=True)[0].sum()
    (gradient,) = torch.autograd.grad(out, z, retain_graph=True)
    assert gradient.data_ptr() == memory
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out, z)


def test_rows_may_lie_apart():
    logits, target, upstream = inputs(129)
    apart = torch.cat([logits, torch.full((T, 7), 9.0)], 1).to(DEVICE)[:, :129]
    assert torch.equal(
        kernel.logprob(apart, target.to(DEVICE), temperature=1.0)[0].cpu(),
        ours(logits, target, upstream, 1.0)[0]["logsumexp"],
    )


def test_no_rows_and_no_upstream_gradient():
    logits, target, upstream = inputs(129, rows=0)
    values, gradient = ours(logits, target, upstream, 1.0)
    assert [x.shape for x in values.values()] == [(0,)] * 3 and gradient.shape == (0, 129)
    logits, target, upstream = inputs(129)
    assert not ours(logits, target, {name: g * 0 for name, g in upstream.items()}, 1.0)[1].any()


def test_two_runs_are_equal_bit_for_bit():
    one, other = (ours(*inputs(129, torch.bfloat16), 1.0) for _ in range(2))
    assert torch.equal(one[1], other[1]) and all(torch.equal(one[0][name], other[0][name]) for name in OUTPUTS)


def test_what_the_kernel_cannot_take_is_refused():
    logits, target, _ = inputs(129)
    for wrong in (logits.half(), logits.T.contiguous().T):
        with pytest.raises(ValueError, match="logits of"):
            kernel.logprob(wrong, target, temperature=1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_more_logits_than_32_bits_count(dtype, monkeypatch):
    monkeypatch.setattr(kernel, "BLOCK_V", 4096)
    rows, V = 16384, 151936  # 2.5e9
    g = torch.Generator(DEVICE).manual_seed(0)
    logits = torch.empty(rows, V, dtype=dtype, device=DEVICE).normal_(0, 3, generator=g)
    target = torch.randint(0, V, (rows,), generator=g, device=DEVICE)
    last = slice(rows - 64, rows)
    part = logits[last].clone().double().requires_grad_()
    true = reference.logprob(part, target[last], temperature=0.8)
    (true[1] - true[0]).sum().backward()
    out = kernel.logprob(logits.requires_grad_(), target, temperature=0.8, in_place=True)
    for mine, exact in zip(out, true, strict=True):
        assert (mine[last] - exact).abs().max() <= 1e-4  # reference.logprob computes in float32: some ulp of 20
    (gradient,) = torch.autograd.grad((out[1] - out[0]).sum(), logits)
    error = (gradient[last].double() - part.grad).abs()
    assert (error <= (2.0**-8 if dtype == torch.bfloat16 else 1e-5) * part.grad.abs() + 1e-6).all()
