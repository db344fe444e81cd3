"""Triton's passes of linear_grpo against autograd in float64: by the interpreter on a CPU
(tests/kernels/test_interpreter.py runs this file), on a GPU as they are, there at a size of training too.

Not covered here: what is linear_grpo's own (test_linear_grpo.py), speed and memory (benchmarks/kernels.py).
"""

import os

import pytest
import torch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("tests/kernels/test_interpreter.py runs this file", allow_module_level=True)

from grpo_mcore.config import config
from grpo_mcore.kernels import linear_grpo_triton as kernel
from grpo_mcore.kernels.linear_grpo import linear_grpo
from tests.kernels.test_linear_grpo import ULP, D, R, V, inputs, microbatch, naive, ours

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []
TRITON = {"logits": kernel.TritonLogits}
LOSSES = (config.Loss(clip_dual=1.2, kl_coef=0.1), config.Loss(policy_loss="cispo", entropy_coef=0.2))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(kernel, "BLOCK", 16)  # 37 logits: two blocks and a part


def exact_and_batch(dtype, cfg, importance: bool = True):
    """(loss, log-probs, entropies and gradients in float64 of inputs that `dtype` holds, float32 microbatch)"""
    hidden, weight, target = (x.double() if x.is_floating_point() else x for x in inputs(dtype, device=DEVICE))
    logprob = (hidden @ weight.T / 0.7).log_softmax(1).gather(1, target[:, None])[:, 0]
    exact = naive(hidden, weight, target, microbatch(logprob, importance), cfg)
    return exact, microbatch(logprob, importance, torch.float32)


@pytest.mark.parametrize("cfg", LOSSES, ids=["ppo_clip", "cispo"])
@pytest.mark.parametrize("rows", [6, R])
def test_float32_values_and_gradients_are_autograds_in_float64(cfg, rows):
    exact, batch = exact_and_batch(torch.float32, cfg)
    hidden, weight, target = inputs(torch.float32, device=DEVICE)
    got = ours(hidden, weight, target, batch, cfg, workspace_bytes=rows * V * 4, **TRITON)
    noise = 16 * ULP * (hidden @ weight.T / 0.7).abs().max()  # of exp, see test_linear_logprob.py
    for mine, true in zip(got, exact, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - true).abs().max() <= noise * max(true.abs().max(), 1e-2)


@pytest.mark.parametrize("cfg", LOSSES, ids=["ppo_clip", "cispo"])
def test_bfloat16_rounds_dz_and_the_results_alone(cfg):
    exact, batch = exact_and_batch(torch.bfloat16, cfg)
    hidden, weight, target = inputs(torch.bfloat16, device=DEVICE)
    main_grad = torch.zeros(V, D, device=DEVICE)
    got = ours(hidden, weight, target, batch, cfg, workspace_bytes=6 * V * 6, main_grad_VD=main_grad, **TRITON)
    assert got[1].dtype == torch.float32 and got[3].dtype == torch.bfloat16 and got[4] is None
    for mine, true in zip(got[:3], exact[:3], strict=True):
        assert (mine - true).abs().max() <= 1e-5 * max(true.abs().max(), 1)  # float32: no logit is rounded
    for mine, true in ((got[3], exact[3]), (main_grad, exact[4])):
        assert (mine - true).abs().max() <= 2 * 2.0**-8 * true.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scoring_gives_the_same_log_probs_bit_for_bit_and_so_does_another_run(dtype):
    hidden, weight, target = inputs(dtype, device=DEVICE)
    how = {"temperature": 0.7, "workspace_bytes": 6 * V * 6, **TRITON}
    _, scored, entropy = linear_grpo(hidden, weight, target, None, **how)
    learning = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    for _ in range(2):
        _, logprob, other_entropy = linear_grpo(*learning, target, lambda lp, e, rows: (lp + e).sum(), **how)
        assert torch.equal(logprob, scored) and torch.equal(other_entropy, entropy)


@pytest.mark.parametrize("logits", [[1e4, -1e4, 0.0, 3.0], [-1e4, 0.0, 3.0, 1e4], [-1e4] * 4, [0.5, -1e4, 0.25, 0.0]])
@pytest.mark.parametrize("spread", [1, 40])  # neighbours, or each in a block of its own
def test_extreme_logits_give_finite_and_right_values_and_gradients(logits, spread):
    weight = torch.full((4 * spread, 4), -1e4)
    weight[::spread, 0] = torch.tensor(logits)
    weight[:, 1:] = 0
    hidden, target = torch.eye(1, 4).repeat(4, 1), torch.arange(4) * spread
    h, w = (x.clone().to(DEVICE).requires_grad_() for x in (hidden, weight))

    def of_rows(logprob, entropy, rows):
        return (logprob - 0.5 * entropy).sum()

    value, logprob, entropy = linear_grpo(h, w, target.to(DEVICE), of_rows, temperature=1.0, **TRITON)
    value.backward()
    h2, w2 = hidden.double().requires_grad_(), weight.double().requires_grad_()
    log_p = (h2 @ w2.T).log_softmax(1)
    true = log_p.gather(1, target[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)
    of_rows(*true, slice(4)).backward()
    ulps = 2 * ULP * 1e4  # of the largest logit and its factor, see test_linear_logprob.py
    assert (logprob.cpu() - true[0]).abs().max() <= 2 * ulps and (entropy.cpu() - true[1]).abs().max() <= 2 * ulps
    assert (w.grad.cpu() - w2.grad).abs().max() <= 4 * 2 * 2 * ulps
    assert (h.grad.cpu() - h2.grad).abs().max() <= 4 * 2 * 2 * ulps * 1e4


def test_no_rows_have_a_loss_of_zero_and_no_gradient():
    hidden, weight, target = inputs(torch.float32, device=DEVICE)
    batch = microbatch(torch.zeros(0, device=DEVICE), False, torch.float32)
    value, logprob, _, d_hidden, d_weight = ours(hidden[:0], weight, target[:0], batch, config.Loss(), **TRITON)
    assert value == 0 and logprob.shape == (0,) and d_hidden.shape == (0, D) and not d_weight.any()


@pytest.mark.skipif(not ON_GPU, reason="needs CUDA, and pytest -m gpu")
def test_at_a_size_of_training(monkeypatch):
    monkeypatch.setattr(kernel, "BLOCK", 4096)
    g = torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.randn(4096, 1536, generator=g, device=DEVICE).bfloat16().requires_grad_()
    weight = (torch.randn(151936, 1536, generator=g, device=DEVICE) * 2 / 1536**0.5).bfloat16().requires_grad_()
    target = torch.randint(0, 151936, (4096,), generator=g, device=DEVICE)
    main_grad = torch.zeros(151936, 1536, device=DEVICE)

    def of_rows(logprob, entropy, rows):
        return (logprob - 0.1 * entropy).sum() / 4096

    value, _, _ = linear_grpo(hidden, weight, target, of_rows, temperature=1.0, main_grad_VD=main_grad, **TRITON)
    value.backward()
    some = torch.arange(0, 4096, 64, device=DEVICE)
    h = hidden.detach()[some].double().requires_grad_()
    log_p = (h @ weight.detach().double().T).log_softmax(1)
    logprob, entropy = log_p.gather(1, target[some, None])[:, 0], -(log_p.exp() * log_p).sum(1)
    of_rows(logprob, entropy, None).backward()
    assert (hidden.grad[some] - h.grad).abs().max() <= 2 * 2.0**-8 * h.grad.abs().max()
    assert main_grad.isfinite().all() and main_grad.abs().max() > 0
