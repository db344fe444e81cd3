"""Triton: linear_logprob of kernels/reference.py without logits in memory, in either direction. Deterministic: no
atomics.

Forward: a program keeps a block of rows and walks through one split of the vocabulary with an online softmax; the
splits' partials are merged afterwards. Backward: logits are recomputed, a rectangle of rows x columns at a time, into
their gradient dz in the weight's dtype; two matrix products of cuBLAS take it from there, dHidden += dz @ weight and
dWeight += dz.T @ hidden, in float32.

Programs start in groups of row blocks, each group with all of its columns before the next: the hidden states of a group
stay in the L2 cache (50 MB) while the weight streams past it, once for each group. With all row blocks at once, 75 MB
of hidden states (24,576 rows of 1,536) came from memory anew for every block of columns.

Logits are kept in units of log 2 (suffix 2): exp2 is what the hardware has. Products accumulate in float32; what is
rounded to the inputs' dtype is dz, once, and each finished gradient, once.
"""

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from grpo_mcore.kernels.pick import WORKSPACE_BYTES

LOG2_E = 1.4426950408889634
BELOW_ALL = tl.constexpr(-1e38)  # a logit that is not there: finite, for 0 x infinity is not 0
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

# WORKSPACE_BYTES is of the backward, above inputs, gradients and dHidden in float32: dz, and the float32 dWeight of the
# columns at work. Smaller is slower: dHidden is read and written once for every rectangle of columns, dWeight for every
# one of rows.
ROWS = 32768  # of a rectangle of dz, at most: a microbatch in one needs no sums of dWeight
GROUP = 32  # row blocks of dz's kernel that share a stretch of columns: 4,096 rows of 1,536 in bfloat16 are 12.6 MB


class Blocks(NamedTuple):
    """Of one program: rows, vocabulary rows and hidden columns at a time; warps; stages of the pipeline that loads
    them."""

    T: int
    V: int
    D: int
    warps: int
    stages: int


# For Hopper; benchmarks/kernels.py --search finds better ones. Two programs of 4 warps share a multiprocessor, so that
# one's softmax runs during the other's products: 128 x 128 float32 sums are 128 registers a thread, and 3 stages 96 KiB
# of its 227.
FORWARD = {torch.bfloat16: Blocks(128, 128, 64, 4, 3), torch.float32: Blocks(64, 64, 32, 4, 3)}
BACKWARD = {torch.bfloat16: Blocks(128, 128, 64, 4, 3), torch.float32: Blocks(64, 64, 32, 4, 3)}


@triton.jit
def _logits2(
    hidden,
    weight,
    row,
    column,
    scale,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """hidden @ weight.T * scale of one block, float32; 0 where the descriptors end."""
    z = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    for d in range(0, D, BLOCK_D):
        h, w = hidden.load([row, d]), weight.load([column, d])
        if INTERPRETED:  # its dot multiplies the bits of bfloat16 as integers
            h, w = h.to(tl.float32), w.to(tl.float32)
        z = tl.dot(h, w.T, z, input_precision="ieee")
    return z * scale


@triton.jit
def _in_group(program, group, row_blocks, column_blocks):
    """(row block, column block) of a program: groups of row blocks one behind the other, and in each the rows go round
    before the columns."""
    of_group = program // (group * column_blocks)
    first, place = of_group * group, program % (group * column_blocks)
    rows = min(group, row_blocks - first)
    return first + place % rows, place // rows


# What differs from call to call must not make a new kernel: each takes seconds to compile, at other moments on other
# ranks.
@triton.jit(do_not_specialize=["T", "blocks_per_split", "group", "row_blocks", "splits"])
def _forward(
    hidden,
    weight,
    target_T,
    partials,
    T,
    V,
    scale,
    blocks_per_split,
    group,
    row_blocks,
    splits,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """partials [3, splits, T] of program (row block, split): logsumexp2, target2, mean2."""
    row_block, split = _in_group(tl.program_id(0), group, row_blocks, splits)
    row = row_block * BLOCK_T
    rows = row + tl.arange(0, BLOCK_T)
    target = tl.load(target_T + rows, mask=rows < T, other=-1).to(tl.int32)
    target = tl.where(target < V, target, -1)  # V and above may be columns of the last block
    maximum = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    weighted = tl.zeros((BLOCK_T,), tl.float32)
    at_target = tl.zeros((BLOCK_T,), tl.float32)
    first = split * blocks_per_split
    for block in range(first, min(first + blocks_per_split, tl.cdiv(V, BLOCK_V))):
        z = _logits2(hidden, weight, row, block * BLOCK_V, scale, D, BLOCK_T, BLOCK_V, BLOCK_D)
        columns = block * BLOCK_V + tl.arange(0, BLOCK_V)
        z = tl.where((columns < V)[None, :], z, BELOW_ALL)
        at_target += tl.sum(tl.where(columns[None, :] == target[:, None], z, 0.0), 1)
        new = tl.maximum(maximum, tl.max(z, 1))
        rescale = tl.exp2(maximum - new)
        e = tl.exp2(z - new[:, None])
        total = total * rescale + tl.sum(e, 1)
        weighted = weighted * rescale + tl.sum(e * z, 1)
        maximum = new
    size = splits * T
    out = partials + split * T + rows
    tl.store(out, maximum + tl.log2(total), mask=rows < T)
    tl.store(out + size, at_target, mask=rows < T)
    tl.store(out + 2 * size, weighted / total, mask=rows < T)


@triton.jit(do_not_specialize=["T", "first_row", "first_column", "group", "row_blocks", "column_blocks"])
def _dz(
    hidden,
    weight,
    dz,
    target_T,
    of_row,
    T,
    first_row,
    first_column,
    scale,
    group,
    row_blocks,
    column_blocks,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One block of dz = p (constant + slope z2) + [j = target] at_target; of_row [4, T] holds logsumexp2, constant,
    slope and at_target. Descriptors begin at first_row and first_column."""
    row_block, column_block = _in_group(tl.program_id(0), group, row_blocks, column_blocks)
    row, column = row_block * BLOCK_T, column_block * BLOCK_V
    z = _logits2(hidden, weight, row, column, scale, D, BLOCK_T, BLOCK_V, BLOCK_D)
    rows = first_row + row + tl.arange(0, BLOCK_T)
    columns = first_column + column + tl.arange(0, BLOCK_V)
    target = tl.load(target_T + rows, mask=rows < T, other=-1).to(tl.int32)
    logsumexp = tl.load(of_row + rows, mask=rows < T, other=0.0)
    constant = tl.load(of_row + T + rows, mask=rows < T, other=0.0)
    slope = tl.load(of_row + 2 * T + rows, mask=rows < T, other=0.0)
    at_target = tl.load(of_row + 3 * T + rows, mask=rows < T, other=0.0)
    out = tl.exp2(z - logsumexp[:, None]) * (constant[:, None] + slope[:, None] * z)
    out = tl.where(columns[None, :] == target[:, None], out + at_target[:, None], out)
    dz.store([row, column], out.to(dz.dtype))


class LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, target_T, temperature, main_grad_VD, workspace_bytes):
        ctx.temperature, ctx.main_grad_VD, ctx.workspace_bytes = temperature, main_grad_VD, workspace_bytes
        hidden_TD, weight_VD, target_T = hidden_TD.contiguous(), weight_VD.contiguous(), target_T.contiguous()
        logsumexp2, target2, mean2 = _partials2(hidden_TD, weight_VD, target_T, temperature)
        ctx.save_for_backward(hidden_TD, weight_VD, target_T, logsumexp2, mean2)
        return logsumexp2 / LOG2_E, target2 / LOG2_E, mean2 / LOG2_E

    @staticmethod
    def backward(ctx, g_logsumexp, g_target, g_mean):
        hidden_TD, weight_VD, target_T, logsumexp2, mean2 = ctx.saved_tensors
        # The gradient that reference.LinearLogprob derives, of logits in units of log 2 before their division.
        constant = (g_logsumexp + g_mean * (1 - mean2 / LOG2_E)) / ctx.temperature
        slope = g_mean / (LOG2_E * ctx.temperature)
        rows = torch.stack([logsumexp2, constant, slope, g_target / ctx.temperature])
        d_hidden = torch.zeros_like(hidden_TD, dtype=torch.float32)
        d_weight = torch.empty_like(weight_VD) if ctx.main_grad_VD is None else None
        (T, D), V = hidden_TD.shape, weight_VD.shape[0]
        if T == 0 or V == 0:
            return d_hidden.to(hidden_TD.dtype), d_weight if d_weight is None else d_weight.zero_(), *[None] * 4
        height, width = rectangle(T, D, hidden_TD.element_size(), ctx.workspace_bytes, fused=d_weight is None)
        width = min(width, triton.cdiv(V, 128) * 128)
        dz = hidden_TD.new_empty(height, width)
        sums = hidden_TD.new_empty(width, D, dtype=torch.float32) if height < T and d_weight is not None else None
        for start in range(0, V, width):
            columns = slice(start, min(start + width, V))
            weight = weight_VD[columns]
            whole = None if d_weight is None else d_weight[columns]
            accumulator = None if sums is None else sums[: len(weight)].zero_()
            if whole is None:
                accumulator = ctx.main_grad_VD[columns]
            for top in range(0, T, height):
                hidden = hidden_TD[top : top + height]
                part = dz[: len(hidden), : len(weight)]
                _launch_dz(hidden, weight, part, target_T, rows, (top, start), ctx.temperature)
                _add_product(d_hidden[top : top + height], part, weight)
                if accumulator is None:
                    torch.mm(part.T, hidden, out=whole)
                else:
                    _add_product(accumulator, part.T, hidden)
            if whole is not None and accumulator is not None:
                whole.copy_(accumulator)
        return d_hidden.to(hidden_TD.dtype), d_weight, *[None] * 4


def _partials2(hidden_TD, weight_VD, target_T, temperature: float):
    """The three outputs [T] in units of log 2."""
    (T, D), V, blocks = hidden_TD.shape, weight_VD.shape[0], FORWARD[hidden_TD.dtype]
    if T == 0 or V == 0:
        zero = hidden_TD.new_zeros(T, dtype=torch.float32)
        return zero - float("inf"), zero, zero
    row_blocks, column_blocks = triton.cdiv(T, blocks.T), triton.cdiv(V, blocks.V)
    at_once = _programs_at_once(hidden_TD.device, blocks, hidden_TD.element_size())
    splits = num_splits(row_blocks, column_blocks, at_once)
    blocks_per_split = triton.cdiv(column_blocks, splits)
    splits = triton.cdiv(column_blocks, blocks_per_split)
    partials = hidden_TD.new_empty(3, splits, T, dtype=torch.float32)
    _forward[(row_blocks * splits,)](
        _descriptor(hidden_TD, blocks.T, blocks.D),
        _descriptor(weight_VD, blocks.V, blocks.D),
        target_T,
        partials,
        T,
        V,
        LOG2_E / temperature,
        blocks_per_split,
        max(at_once // splits, 1),  # row blocks of which all splits run at once
        row_blocks,
        splits,
        D,
        *blocks[:3],
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        enable_fp_fusion=True,
    )
    logsumexp2_KT, target2_KT, mean2_KT = partials
    top = logsumexp2_KT.amax(0)
    # Divided by their own sum below: the logsumexp's rounding would be that of a large number.
    share_KT = (logsumexp2_KT - top).exp2()
    total = share_KT.sum(0)
    return top + total.log2(), target2_KT.sum(0), (share_KT * mean2_KT).sum(0) / total


def _launch_dz(hidden, weight, dz, target_T, rows_4T, start: tuple[int, int], temperature: float) -> None:
    blocks = BACKWARD[hidden.dtype]
    row_blocks, column_blocks = triton.cdiv(dz.shape[0], blocks.T), triton.cdiv(dz.shape[1], blocks.V)
    _dz[(row_blocks * column_blocks,)](
        _descriptor(hidden, blocks.T, blocks.D),
        _descriptor(weight, blocks.V, blocks.D),
        _descriptor(dz, blocks.T, blocks.V),
        target_T,
        rows_4T,
        len(target_T),
        *start,
        LOG2_E / temperature,
        GROUP,
        row_blocks,
        column_blocks,
        hidden.shape[1],
        *blocks[:3],
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        enable_fp_fusion=True,
    )


def _add_product(sum_MN: torch.Tensor, a_MK: torch.Tensor, b_KN: torch.Tensor) -> None:
    """float32 sum += a @ b, where the products of bfloat16 are not rounded before they are added."""
    if a_MK.dtype == sum_MN.dtype:
        sum_MN.addmm_(a_MK, b_KN)
    elif a_MK.is_cuda:
        torch.addmm(sum_MN, a_MK, b_KN, out_dtype=sum_MN.dtype, out=sum_MN)
    else:
        sum_MN.addmm_(a_MK.float(), b_KN.float())


def _descriptor(x: torch.Tensor, *block: int) -> TensorDescriptor:
    """Reads 0 and writes nothing beyond the edges of x; its offsets are 64 bits wide."""
    return TensorDescriptor.from_tensor(x, list(block))


def _programs_at_once(device: torch.device, blocks: Blocks, itemsize: int) -> int:
    if device.type != "cuda":
        return max(8 // blocks.warps, 1)
    of_device = torch.cuda.get_device_properties(device)
    return of_device.multi_processor_count * programs_of(blocks, itemsize, of_device.shared_memory_per_multiprocessor)


def programs_of(blocks: Blocks, itemsize: int, shared_bytes: int) -> int:
    """That run on one multiprocessor at once: as many as its registers (8 warps of 128 x 128 sums) and its shared
    memory hold, where each has its stages' blocks and about 2 KiB more."""
    of_program = (blocks.T + blocks.V) * blocks.D * itemsize * blocks.stages + 2048
    return max(min(8 // blocks.warps, shared_bytes // of_program), 1)


def num_splits(row_blocks: int, column_blocks: int, programs_at_once: int) -> int:
    """Of the vocabulary, so that the programs end together: the fewest of the least (waves of programs x blocks of
    one)."""

    def duration(splits: int) -> int:
        return triton.cdiv(row_blocks * splits, programs_at_once) * triton.cdiv(column_blocks, splits)

    return min(range(1, min(column_blocks, 64) + 1), key=duration)


def rectangle(T: int, D: int, itemsize: int, workspace_bytes: int, *, fused: bool) -> tuple[int, int]:
    """(rows, columns) of dz within workspace_bytes, columns a multiple of 128. fused: dWeight has its own float32
    buffer."""
    rows = triton.cdiv(T, triton.cdiv(T, ROWS))
    bytes_per_column = rows * itemsize + (0 if fused or rows == T else 4 * D)
    return rows, max(workspace_bytes // bytes_per_column // 128 * 128, 128)


def linear_logprob(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_T: torch.Tensor,
    *,
    temperature: float,
    main_grad_VD: torch.Tensor | None = None,
    workspace_bytes: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logsumexp_T, target_T, mean_logit_T), float32; what they are, and main_grad_VD, see reference.linear_logprob.
    workspace_bytes: of the backward; None: WORKSPACE_BYTES.

    hidden and weight: both bfloat16 or both float32, D a multiple of 16 bytes. ValueError for others.
    """
    if hidden_TD.dtype not in FORWARD or weight_VD.dtype != hidden_TD.dtype:
        raise ValueError(
            f"linear_logprob: hidden {hidden_TD.dtype} and weight {weight_VD.dtype} must both be bfloat16 or both "
            f"float32"
        )
    if hidden_TD.shape[1] * hidden_TD.element_size() % 16:
        raise ValueError(
            f"linear_logprob: D = {hidden_TD.shape[1]} of {hidden_TD.dtype} must be a multiple of 16 bytes: take "
            f"impl = reference"
        )
    return LinearLogprob.apply(
        hidden_TD, weight_VD, target_T, temperature, main_grad_VD, workspace_bytes or WORKSPACE_BYTES
    )
