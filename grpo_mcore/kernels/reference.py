"""Plain PyTorch: the CPU path, and the twin of every Triton kernel.

Shapes: T rows (response tokens), D hidden, V vocabulary rows of this shard.
"""

import torch

CHUNK_V = 2048


class LinearLogprob(torch.autograd.Function):
    """In chunks of the vocabulary, recomputed in the backward; [T, V] never exists.

    Above inputs and gradients it takes dHidden in float32 and, for a chunk, the product in the inputs' dtype and two
    [T, chunk] blocks in float32. All are written in place: on a CPU, fresh memory costs more than the arithmetic done
    in it. With p the softmax within the shard and g the upstream gradients,

        dz_j = p_j (g_logsumexp + g_mean (1 + z_j - mean)) + [j = target] g_target
    """

    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, target_T, temperature, chunk_V, main_grad_VD):
        T, V = hidden_TD.shape[0], weight_VD.shape[0]
        maximum = hidden_TD.new_full((T,), float("-inf"), dtype=torch.float32)
        total = torch.zeros_like(maximum)  # sum of exp(z - maximum)
        weighted = torch.zeros_like(maximum)  # sum of z exp(z - maximum)
        target_logit = torch.zeros_like(maximum)
        chunks = _Chunks(hidden_TD, weight_VD, target_T, temperature, chunk_V)
        for columns in chunks:
            z, e = chunks.logits(columns)
            inside, column = chunks.target(columns)
            target_logit += torch.where(inside, z.gather(1, column[:, None])[:, 0], 0.0)
            new = torch.maximum(maximum, z.amax(1))
            rescale = (maximum - new).exp()
            torch.sub(z, new[:, None], out=e).exp_()
            total = total * rescale + e.sum(1)
            weighted = weighted * rescale + e.mul_(z).sum(1)
            maximum = new
        logsumexp = maximum + total.log()
        mean_logit = weighted / total if V else weighted
        ctx.save_for_backward(hidden_TD, weight_VD, target_T, logsumexp, mean_logit)
        ctx.temperature, ctx.chunk_V, ctx.main_grad_VD = temperature, chunk_V, main_grad_VD
        return logsumexp, target_logit, mean_logit

    @staticmethod
    def backward(ctx, g_logsumexp, g_target, g_mean):
        hidden_TD, weight_VD, target_T, logsumexp, mean_logit = ctx.saved_tensors
        d_hidden = torch.zeros_like(hidden_TD, dtype=torch.float32)
        d_weight = torch.empty_like(weight_VD) if ctx.main_grad_VD is None else None
        constant, slope = (g_logsumexp + g_mean * (1 - mean_logit)) / ctx.temperature, g_mean / ctx.temperature
        chunks = _Chunks(hidden_TD, weight_VD, target_T, ctx.temperature, ctx.chunk_V)
        for columns in chunks:
            z, dz = chunks.logits(columns)
            torch.sub(z, logsumexp[:, None], out=dz).exp_()
            dz *= z.mul_(slope[:, None]).add_(constant[:, None])
            inside, column = chunks.target(columns)
            dz.scatter_add_(1, column[:, None], torch.where(inside, g_target / ctx.temperature, 0.0)[:, None])
            dz = chunks.product(columns).copy_(dz)
            d_hidden += dz @ weight_VD[columns]
            # A copy and a plain product take less than oneDNN's product of a transposed matrix.
            dz_T = dz.T.contiguous()
            if d_weight is None:
                ctx.main_grad_VD[columns] += dz_T @ hidden_TD
            else:
                torch.mm(dz_T, hidden_TD, out=d_weight[columns])
        return d_hidden.to(hidden_TD.dtype), d_weight, None, None, None, None


class _Chunks:
    """Of the vocabulary, as slices; and the memory that they take in turn."""

    def __init__(self, hidden_TD, weight_VD, target_T, temperature: float, chunk_V: int):
        self.hidden_TD, self.weight_VD, self.target_T = hidden_TD, weight_VD, target_T
        self.temperature, self.chunk_V = temperature, chunk_V
        size = hidden_TD.shape[0] * min(chunk_V, weight_VD.shape[0])
        self._blocks = hidden_TD.new_empty(2, size, dtype=torch.float32)
        self._product = self._blocks[1] if hidden_TD.dtype == torch.float32 else hidden_TD.new_empty(size)

    def __iter__(self):
        for start in range(0, self.weight_VD.shape[0], self.chunk_V):
            yield slice(start, min(start + self.chunk_V, self.weight_VD.shape[0]))

    def logits(self, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """(z, a block of its shape), float32 [T, columns], until the next call."""
        z, other = (self._view(block, columns) for block in self._blocks)
        z.copy_(torch.mm(self.hidden_TD, self.weight_VD[columns].T, out=self.product(columns)))
        return z.div_(self.temperature), other

    def product(self, columns: slice) -> torch.Tensor:
        """[T, columns] in the inputs' dtype; of float32, the other block of `logits`."""
        return self._view(self._product, columns)

    def target(self, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """(whether these columns hold the row's target, its column here or else 0), [T]."""
        inside = (self.target_T >= columns.start) & (self.target_T < columns.stop)
        return inside, torch.where(inside, self.target_T - columns.start, 0)

    def _view(self, flat: torch.Tensor, columns: slice) -> torch.Tensor:
        shape = self.hidden_TD.shape[0], columns.stop - columns.start
        return flat[: shape[0] * shape[1]].view(shape)


def linear_logprob(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_T: torch.Tensor,
    *,
    temperature: float,
    main_grad_VD: torch.Tensor | None = None,
    chunk_V: int = CHUNK_V,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logsumexp_T, target_T, mean_logit_T), float32, differentiable, of z = hidden @ weight.T / temperature of this
    shard: log sum exp z; z at the target (0 where the target, counted from this shard's first row, lies outside it);
    and the mean of z under the softmax of this shard.

    main_grad_VD: float32, these rows of Megatron's gradient buffer. The weight's gradient is added there, and none is
    returned: param.grad stays None (or what the embedding has put there, if tied), which DDP's hook does not add again;
    so param.grad_added_to_main_grad must stay False. Not for overlap_grad_reduce, whose hook insists on a param.grad.
    """
    return LinearLogprob.apply(hidden_TD, weight_VD, target_T, temperature, chunk_V, main_grad_VD)
