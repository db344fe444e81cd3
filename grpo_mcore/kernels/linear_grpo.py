"""The head of an update without recomputation: loss, log-probs and entropies, and the gradients of hidden and weight,
from logits that are computed once. Plain PyTorch, whose library makes the products.

A loss that is pointwise in the token, each one's part needing its own log-prob and entropy alone, can be differentiated
as soon as a row's logits are known. So a chunk of rows goes through everything before the next: its logits z, in
float32; their statistics; the loss, and its gradients g with respect to log-prob and entropy; dz in place of z;
dHidden, once; dWeight, added up. Three products, where a backward pass of its own (reference.py) takes four. With p the
softmax and mean = sum p z, of logits that have been divided by the temperature,

    dz_j = -p_j (g_logprob + g_entropy (z_j - mean)) + [j = target] g_logprob

On a CPU log-probs and entropies are those of reference.linear_logprob bit for bit, given the same rows at a time.

If ranks split the vocabulary, a function that is handed in makes the whole one's statistics of the shards': one small
gathering for each chunk. From there on each rank knows all that its dz needs.

Shapes: R rows (response tokens), n of a chunk, D hidden, V vocabulary rows of this shard.
"""

from collections.abc import Callable, Iterator

import torch

# (logprob_n, entropy_n, which of the R rows they are of) -> the sum of their parts of the loss
Loss = Callable[[torch.Tensor, torch.Tensor, slice], torch.Tensor]

# (logsumexp_n, target's logit, mean logit) of this shard -> those of the whole vocabulary, without gradients
OfShards = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]

# A chunk's logits, in float32. dWeight is read and written once for each chunk: fewer than some hundred rows are slow.
# On a GPU 2,048 rows of 151,936 logits, and their gradient in bfloat16.
WORKSPACE_BYTES = {"cpu": 256 << 20, "cuda": 1792 << 20}
# Of the vocabulary at a time: on a CPU as many as its caches hold, and as reference.py has.
COLUMNS = {"cpu": 2048, "cuda": 16384}


def whole(logsumexp: torch.Tensor, at_target: torch.Tensor, mean: torch.Tensor):
    """OfShards of a vocabulary that is not split."""
    return logsumexp, at_target, mean


class LinearGrpo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_RD, weight_VD, target_R, loss, logits, chunks, of_shards, main_grad_VD, wanted):
        logprob_R, entropy_R = (hidden_RD.new_empty(len(hidden_RD), dtype=logits.dtype) for _ in range(2))
        d_hidden = torch.zeros_like(hidden_RD[: len(hidden_RD) * wanted], dtype=logits.dtype)
        d_weight = main_grad_VD
        if d_weight is None:
            # A gradient of one chunk is not added up: it need not be wider than what is returned.
            dtype = weight_VD.dtype if len(chunks) == 1 else logits.dtype
            d_weight = torch.zeros_like(weight_VD[: len(weight_VD) * wanted], dtype=dtype)
        values = []
        for rows in chunks:
            hidden, target = hidden_RD[rows], target_R[rows]
            logsumexp, at_target, mean = of_shards(*logits.statistics(hidden, target, keep=wanted))
            logprob_R[rows], entropy_R[rows] = at_target - logsumexp, logsumexp - mean
            if loss is None:
                continue
            value, g_logprob, g_entropy = _differentiate(loss, logprob_R[rows], entropy_R[rows], rows)
            values.append(value)
            if not wanted:
                continue
            for columns, dz in logits.gradients(target, logsumexp, mean, g_logprob, g_entropy):
                _add_product(d_hidden[rows], dz, weight_VD[columns])
                # A copy and a plain product take less than oneDNN's product of a transposed matrix.
                _add_product(d_weight[columns], dz.T if dz.is_cuda else dz.T.contiguous(), hidden)
        ctx.mark_non_differentiable(logprob_R, entropy_R)
        ctx.in_main_grad = main_grad_VD is not None
        if wanted:
            ctx.save_for_backward(
                d_hidden.to(hidden_RD.dtype), None if ctx.in_main_grad else d_weight.to(weight_VD.dtype)
            )
        return torch.stack(values).sum() if values else None, logprob_R, entropy_R

    @staticmethod
    def backward(ctx, g_loss, *_):
        d_hidden, d_weight = ctx.saved_tensors
        if ctx.in_main_grad:
            torch._assert_async(g_loss == 1)  # what has been added there cannot be scaled any more
            return d_hidden, *[None] * 8
        return d_hidden * g_loss, d_weight * g_loss, *[None] * 7


def _differentiate(loss: Loss, logprob: torch.Tensor, entropy: torch.Tensor, rows: slice):
    """(value, its gradient with respect to log-prob, and to entropy, None where it does not depend on them)"""
    with torch.enable_grad():
        leaves = logprob.detach().requires_grad_(), entropy.detach().requires_grad_()
        value = loss(*leaves, rows)
        g_logprob, g_entropy = torch.autograd.grad(value, leaves, allow_unused=True)
    return value.detach(), torch.zeros_like(logprob) if g_logprob is None else g_logprob, g_entropy


def _add_product(sum_MN: torch.Tensor, a_MK: torch.Tensor, b_KN: torch.Tensor) -> None:
    if a_MK.dtype == sum_MN.dtype:
        sum_MN.addmm_(a_MK, b_KN)
    elif a_MK.is_cuda:  # products of bfloat16 that are not rounded before they are added
        torch.addmm(sum_MN, a_MK, b_KN, out_dtype=sum_MN.dtype, out=sum_MN)
    else:
        sum_MN += a_MK @ b_KN


class Logits:
    """Of one chunk of rows at a time, block by block of the vocabulary, and their gradient in their place."""

    @staticmethod
    def bytes_each(dtype: torch.dtype) -> int:
        """Of the workspace for a logit, whose inputs are of this dtype; a block's scratch is not counted."""
        return max(dtype.itemsize, 4)

    def __init__(self, weight_VD: torch.Tensor, rows: int, columns: int, temperature: float):
        self.weight_VD, self.temperature = weight_VD, temperature
        V = weight_VD.shape[0]
        self.columns = [slice(start, min(start + columns, V)) for start in range(0, V, columns)]
        self.dtype = torch.promote_types(weight_VD.dtype, torch.float32)
        block, narrow = rows * min(columns, V), weight_VD.dtype != self.dtype
        self._kept = weight_VD.new_empty(rows * V, dtype=self.dtype)
        self._block = weight_VD.new_empty(block, dtype=self.dtype)
        self._product = weight_VD.new_empty(block) if narrow else None  # in the inputs' dtype

    def statistics(self, hidden: torch.Tensor, target: torch.Tensor, *, keep: bool):
        """(logsumexp, the target's logit or 0 if it lies outside, mean logit), [n]. keep: `gradients` will be asked for
        these rows."""
        maximum = hidden.new_full((len(hidden),), float("-inf"), dtype=self.dtype)
        total, weighted, at_target = (torch.zeros_like(maximum) for _ in range(3))
        for columns in self.columns:
            z = self._z(len(hidden), columns if keep else slice(columns.stop - columns.start))
            e = _view(self._block, z.shape)
            self._multiply(hidden, columns, z)
            inside, column = _target(target, columns)
            at_target += torch.where(inside, z.gather(1, column[:, None])[:, 0], 0.0)
            new = torch.maximum(maximum, z.amax(1))
            rescale = (maximum - new).exp()
            torch.sub(z, new[:, None], out=e).exp_()
            total = total * rescale + e.sum(1)
            weighted = weighted * rescale + e.mul_(z).sum(1)
            maximum = new
        return maximum + total.log(), at_target, weighted / total if self.columns else weighted

    def gradients(self, target, logsumexp, mean, g_logprob, g_entropy) -> Iterator[tuple[slice, torch.Tensor]]:
        """(columns, dz [n, columns] in the inputs' dtype), of the logits that were kept, which end here."""
        g_logprob = g_logprob / self.temperature
        g_entropy = None if g_entropy is None else g_entropy / self.temperature
        for columns in self.columns:
            z = self._z(len(target), columns)
            if g_entropy is None:
                z.sub_(logsumexp[:, None]).exp_().mul_(-g_logprob[:, None])
            else:
                p = torch.sub(z, logsumexp[:, None], out=_view(self._block, z.shape)).exp_()
                z.sub_(mean[:, None]).mul_(-g_entropy[:, None]).sub_(g_logprob[:, None]).mul_(p)
            inside, column = _target(target, columns)
            z.scatter_add_(1, column[:, None], torch.where(inside, g_logprob, 0.0)[:, None])
            yield columns, z if self._product is None else _view(self._product, z.shape).copy_(z)

    def _z(self, n: int, columns: slice) -> torch.Tensor:
        """[n, columns], contiguous: the library multiplies into it."""
        start = columns.start or 0
        return self._kept[n * start : n * columns.stop].view(n, columns.stop - start)

    def _multiply(self, hidden: torch.Tensor, columns: slice, z: torch.Tensor) -> None:
        weight = self.weight_VD[columns]
        if self._product is None:
            torch.mm(hidden, weight.T, out=z)
        elif z.is_cuda:
            torch.mm(hidden, weight.T, out_dtype=z.dtype, out=z)
        else:
            z.copy_(torch.mm(hidden, weight.T, out=_view(self._product, z.shape)))
        z.div_(self.temperature)


def _view(flat: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return flat[: shape.numel()].view(shape)


def _target(target: torch.Tensor, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """(whether these columns hold the row's target, its column here or else 0), [n]"""
    inside = (target >= columns.start) & (target < columns.stop)
    return inside, torch.where(inside, target - columns.start, 0)


def row_chunks(R: int, V: int, itemsize: int, workspace_bytes: int) -> list[slice]:
    """The rows, cut as equally as can be, so that a chunk's logits of `itemsize` bytes take no more than
    workspace_bytes; but each has a row, if there is one. One chunk at least: a loss of no rows has a value too."""
    most = max(workspace_bytes // max(V * itemsize, 1), 1)
    size = max(-(-R // max(-(-R // most), 1)), 1)
    return [slice(start, min(start + size, R)) for start in range(0, max(R, 1), size)]


def linear_grpo(
    hidden_RD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_R: torch.Tensor,
    loss: Loss | None,
    *,
    temperature: float,
    main_grad_VD: torch.Tensor | None = None,
    workspace_bytes: int | None = None,
    columns: int | None = None,
    logits: type[Logits] = Logits,
    of_shards: OfShards = whole,
    rows_V: int | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """(loss, logprob_R, entropy_R) of softmax(hidden @ weight.T / temperature); float32, or float64 of such inputs.

    loss: pointwise in the token, called chunk by chunk with gradients enabled, and differentiated here; its gradients
    with respect to hidden and weight are those of the value returned. Log-probs and entropies carry none. None: a
    scoring pass, whose loss is None.

    main_grad_VD: see reference.linear_logprob. dWeight is added there in the forward pass, for an upstream gradient of
    1, which parallel/pipeline.py's chain ends with; any other raises in the backward (on CUDA: an assertion of the
    device).

    workspace_bytes: a chunk's logits; None: WORKSPACE_BYTES. Chunks have an effect on the order of sums alone.
    of_shards: makes the whole vocabulary's statistics of all shards'; the gradient of hidden is then this shard's part.
    Targets count from the shard's first row. rows_V: as many as any shard has; None: the weight's. Ranks must cut the
    same chunks.
    logits: how they are kept, this file's or linear_grpo_triton's, which takes float32 and bfloat16.
    """
    R, V, device = len(hidden_RD), rows_V or weight_VD.shape[0], hidden_RD.device.type
    workspace_bytes = workspace_bytes or WORKSPACE_BYTES[device]
    chunks = row_chunks(R, V, logits.bytes_each(weight_VD.dtype), workspace_bytes)
    of_chunk = logits(weight_VD.detach(), chunks[0].stop, columns or COLUMNS[device], temperature)
    # Within a Function gradients are always disabled, and what asks for one says so under no_grad too.
    wanted = loss is not None and torch.is_grad_enabled() and (hidden_RD.requires_grad or weight_VD.requires_grad)
    return LinearGrpo.apply(hidden_RD, weight_VD, target_R, loss, of_chunk, chunks, of_shards, main_grad_VD, wanted)
