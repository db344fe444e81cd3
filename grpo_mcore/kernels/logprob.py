"""Triton: logprob of kernels/reference.py, for logits [T, V] that exist anyway. One pass over them forward, one
backward."""

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
BELOW_ALL = tl.constexpr(-1e38)  # a logit that is not there: finite, for 0 x infinity is not 0
BLOCK_V, WARPS = 4096, 8  # of one program, at a time: 16 float32 a thread


@triton.jit
def _forward(logits, stride, target_T, outputs, T, V, scale, BLOCK_V: tl.constexpr):
    """outputs [3, T] of program `row`: logsumexp, target, mean in units of log 2."""
    row = tl.program_id(0).to(tl.int64)  # T x V may pass 2^31
    maximum = tl.full((BLOCK_V,), BELOW_ALL, tl.float32)  # of each lane, as all that follows
    total = tl.zeros((BLOCK_V,), tl.float32)
    weighted = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, V, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        z = tl.load(logits + row * stride + columns, mask=columns < V, other=0.0).to(tl.float32) * scale
        z = tl.where(columns < V, z, BELOW_ALL)
        new = tl.maximum(maximum, z)
        rescale, e = tl.exp2(maximum - new), tl.exp2(z - new)
        total = total * rescale + e
        weighted = weighted * rescale + e * z
        maximum = new
    top = tl.max(maximum, 0)
    rescale = tl.exp2(maximum - top)  # 0 for a lane without columns
    total, weighted = tl.sum(total * rescale, 0), tl.sum(weighted * rescale, 0)
    target = tl.load(target_T + row)
    inside = (target >= 0) & (target < V)
    at_target = tl.load(logits + row * stride + target, mask=inside, other=0.0).to(tl.float32)
    tl.store(outputs + row, top + tl.log2(total))
    tl.store(outputs + T + row, at_target * scale)
    tl.store(outputs + 2 * T + row, weighted / total)


@triton.jit
def _backward(logits, stride, d_logits, d_stride, target_T, of_row, T, V, scale, BLOCK_V: tl.constexpr):
    """d_logits may be logits."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    z = tl.load(logits + row * stride + columns, mask=columns < V, other=0.0).to(tl.float32) * scale
    constant, slope, at_target = tl.load(of_row + T + row), tl.load(of_row + 2 * T + row), tl.load(of_row + 3 * T + row)
    out = tl.exp2(z - tl.load(of_row + row)) * (constant + slope * z)
    out = tl.where(columns == tl.load(target_T + row), out + at_target, out)
    tl.store(d_logits + row * d_stride + columns, out.to(d_logits.dtype.element_ty), mask=columns < V)


def of_row(g_logsumexp, g_target, g_mean, logsumexp2, mean2, temperature: float) -> torch.Tensor:
    """[4, T] for a backward: logsumexp2, constant, slope and at_target of dz_j = p_j (constant + slope z2_j) + [j =
    target] at_target, the gradient of a logit before its division by the temperature; see reference.LinearLogprob."""
    constant = g_logsumexp + g_mean * (1 - mean2 / LOG2_E)
    return torch.stack([logsumexp2, constant / temperature, g_mean / (LOG2_E * temperature), g_target / temperature])


class Logprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TV, target_T, temperature, in_place):
        (T, V), target_T = logits_TV.shape, target_T.contiguous()
        outputs = logits_TV.new_empty(3, T, dtype=torch.float32)
        if T:
            _forward[T,](
                logits_TV, logits_TV.stride(0), target_T, outputs, T, V, LOG2_E / temperature, BLOCK_V, num_warps=WARPS
            )
        logsumexp2, target2, mean2 = outputs
        ctx.save_for_backward(logits_TV, target_T, logsumexp2, mean2)
        ctx.temperature, ctx.in_place = temperature, in_place
        return logsumexp2 / LOG2_E, target2 / LOG2_E, mean2 / LOG2_E

    @staticmethod
    def backward(ctx, g_logsumexp, g_target, g_mean):
        logits_TV, target_T, logsumexp2, mean2 = ctx.saved_tensors
        (T, V), temperature = logits_TV.shape, ctx.temperature
        rows = of_row(g_logsumexp, g_target, g_mean, logsumexp2, mean2, temperature)
        d_logits = logits_TV.detach() if ctx.in_place else torch.empty_like(logits_TV)
        if T:
            _backward[T, triton.cdiv(V, BLOCK_V)](
                logits_TV,
                logits_TV.stride(0),
                d_logits,
                d_logits.stride(0),
                target_T,
                rows,
                T,
                V,
                LOG2_E / temperature,
                BLOCK_V,
                num_warps=WARPS,
            )
        if ctx.in_place:
            torch.autograd.graph.increment_version(
                logits_TV
            )  # whoever saved the logits too, a second backward included, is told
        return d_logits, None, None, None


def logprob(
    logits_TV: torch.Tensor, target_T: torch.Tensor, *, temperature: float, in_place: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logsumexp_T, target_T, mean_logit_T), float32: the outputs of reference.linear_logprob, of logits before their
    division by the temperature, bfloat16 or float32.

    in_place: the backward overwrites the logits by their gradient, which is that memory; no other may need them then
    (autograd raises RuntimeError if it sees that one does). ValueError for logits without contiguous rows or of another
    dtype.
    """
    if logits_TV.dtype not in (torch.bfloat16, torch.float32) or logits_TV.stride(1) != 1:
        raise ValueError(
            f"logprob: logits of {logits_TV.dtype} with strides {logits_TV.stride()} must be bfloat16 or float32 "
            f"with contiguous rows"
        )
    return Logprob.apply(logits_TV, target_T, temperature, in_place)
