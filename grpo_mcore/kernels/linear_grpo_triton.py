"""Triton: the two passes of linear_grpo.py over a chunk's logits, each of which reads them once: statistics of a row,
and their gradient in the inputs' dtype. The matrix products are cuBLAS's. Deterministic: no atomics.

Logits are kept as the product gave them; their factor, in units of log 2 (suffix 2, for exp2 is what the hardware has),
is taken in the passes.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from grpo_mcore.kernels.linear_grpo import Logits

LOG2_E = 1.4426950408889634
BLOCK = 4096  # logits of a row at a time
WARPS = 8


@triton.jit(do_not_specialize=["n"])
def _statistics(z_nV, target_n, out_3n, n, V, scale2, BLOCK: tl.constexpr):
    """out [3, n] of row program_id: logsumexp2, target2, mean2."""
    row = tl.program_id(0)
    z_V = z_nV + row.to(tl.int64) * V
    maximum = tl.full((BLOCK,), -1e38, tl.float32)  # of each place of the block: one reduction, at the end
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z2 = tl.load(z_V + columns, mask=columns < V, other=0.0) * scale2
        z2 = tl.where(columns < V, z2, -1e38)  # finite, for 0 x infinity is not 0
        new = tl.maximum(maximum, z2)
        rescale, e = tl.exp2(maximum - new), tl.exp2(z2 - new)
        # A place that has seen no logit yet has -1e38 less itself, 0: its e counts nothing.
        e = tl.where(columns < V, e, 0.0)
        total = total * rescale + e
        weighted = weighted * rescale + e * z2
        maximum = new
    top = tl.max(maximum, 0)
    rescale = tl.exp2(maximum - top)
    sum_ = tl.sum(total * rescale, 0)
    tl.store(out_3n + row, top + tl.log2(sum_))
    target = tl.load(target_n + row)
    tl.store(out_3n + n + row, tl.load(z_V + target, mask=(target >= 0) & (target < V), other=0.0) * scale2)
    tl.store(out_3n + 2 * n + row, tl.sum(weighted * rescale, 0) / sum_)


@triton.jit(do_not_specialize=["n"])
def _gradients(z_nV, dz_nV, target_n, of_row_4n, n, V, scale2, BLOCK: tl.constexpr):
    """dz = p (constant + slope z2) + [j = target] at_target of one block of one row; of_row [4, n] holds logsumexp2,
    constant, slope and at_target."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = row.to(tl.int64) * V + columns
    logsumexp = tl.load(of_row_4n + row)
    constant = tl.load(of_row_4n + n + row)
    slope = tl.load(of_row_4n + 2 * n + row)
    at_target = tl.load(of_row_4n + 3 * n + row)
    z2 = tl.load(z_nV + place, mask=columns < V, other=0.0) * scale2
    dz = tl.exp2(z2 - logsumexp) * (constant + slope * z2)
    dz = tl.where(columns == tl.load(target_n + row), dz + at_target, dz)
    tl.store(dz_nV + place, dz.to(dz_nV.dtype.element_ty), mask=columns < V)


class TritonLogits(Logits):
    """Of float32 or bfloat16 inputs. All columns at a time, whatever is asked for."""

    @staticmethod
    def bytes_each(dtype: torch.dtype) -> int:
        return 6 if dtype == torch.bfloat16 else 4

    def __init__(self, weight_VD: torch.Tensor, rows: int, columns: int, temperature: float):
        self.weight_VD, self.temperature = weight_VD, temperature
        self.dtype, self.scale2 = torch.float32, LOG2_E / temperature
        V = weight_VD.shape[0]
        self._kept = weight_VD.new_empty(rows, V, dtype=torch.float32)
        self._dz = self._kept if weight_VD.dtype == torch.float32 else weight_VD.new_empty(rows, V)

    def statistics(self, hidden: torch.Tensor, target: torch.Tensor, *, keep: bool):
        n, V = len(hidden), len(self.weight_VD)
        out_3n = hidden.new_empty(3, n, dtype=torch.float32)
        if not V:
            zero = hidden.new_zeros(n, dtype=torch.float32)
            return zero - float("inf"), zero, zero
        if n:
            self._products(hidden)
            _statistics[(n,)](self._kept, target.contiguous(), out_3n, n, V, self.scale2, BLOCK, num_warps=WARPS)
        logsumexp2, target2, mean2 = out_3n
        return logsumexp2 / LOG2_E, target2 / LOG2_E, mean2 / LOG2_E

    def gradients(self, target, logsumexp, mean, g_logprob, g_entropy) -> Iterator[tuple[slice, torch.Tensor]]:
        n, V = len(target), len(self.weight_VD)
        if not n or not V:
            return
        g_entropy = torch.zeros_like(g_logprob) if g_entropy is None else g_entropy
        # dz of linear_grpo.py, z2 for z LOG2_E.
        constant, slope = g_entropy * mean - g_logprob, -g_entropy / LOG2_E
        of_row_4n = torch.stack([logsumexp * LOG2_E, constant, slope, g_logprob])
        of_row_4n[1:] /= self.temperature
        grid = n, triton.cdiv(V, BLOCK)
        kept, dz = self._kept, self._dz
        _gradients[grid](kept, dz, target.contiguous(), of_row_4n, n, V, self.scale2, BLOCK, num_warps=WARPS)
        yield slice(0, V), dz[:n]

    def _products(self, hidden: torch.Tensor) -> None:
        z = self._kept[: len(hidden)]
        if z.dtype == hidden.dtype:
            torch.mm(hidden, self.weight_VD.T, out=z)
        elif z.is_cuda:
            torch.mm(hidden, self.weight_VD.T, out_dtype=z.dtype, out=z)
        else:  # the interpreter's tests
            torch.mm(hidden.float(), self.weight_VD.T.float(), out=z)
