"""Plain PyTorch: the CPU path, and the oracle of every faster kernel.

Shapes: R rows (response tokens), D hidden, V vocabulary rows of this shard.
"""

import torch


class LinearLogprob(torch.autograd.Function):
    """hidden_RD x weight_VD to three numbers a row, in chunks of the vocabulary; [R, V] never exists.

    Returns (logsumexp_R, target_R, mean_logit_R), float32: over z = hidden @ weight.T / temperature of this shard,
    log sum exp z; z at the target (0 where `target_R`, counted from this shard's first row, lies outside it); and
    the softmax-weighted mean of z. The backward recomputes each chunk of z, so the peak above inputs and
    gradients is two [R, chunk] float32 blocks. With p the softmax within the shard and g the upstream gradients,

        dz_j = p_j (g_logsumexp + g_mean (1 + z_j - mean)) + [j = target] g_target
    """

    @staticmethod
    def forward(ctx, hidden_RD, weight_VD, target_R, temperature, chunk_V):
        rows = hidden_RD.shape[0]
        maximum = hidden_RD.new_full((rows,), float("-inf"), dtype=torch.float32)
        total = torch.zeros_like(maximum)  # sum of exp(z - maximum)
        weighted = torch.zeros_like(maximum)  # sum of z exp(z - maximum)
        target_logit = torch.zeros_like(maximum)
        for start in range(0, weight_VD.shape[0], chunk_V):
            z = _logits(hidden_RD, weight_VD[start : start + chunk_V], temperature)
            inside = (target_R >= start) & (target_R < start + z.shape[1])
            column = torch.where(inside, target_R - start, 0)
            target_logit += torch.where(inside, z.gather(1, column[:, None])[:, 0], 0.0)
            new = torch.maximum(maximum, z.amax(1))
            rescale = (maximum - new).exp()
            e = (z - new[:, None]).exp_()
            total = total * rescale + e.sum(1)
            weighted = weighted * rescale + e.mul_(z).sum(1)
            maximum = new
        logsumexp, mean_logit = maximum + total.log(), weighted / total
        ctx.save_for_backward(hidden_RD, weight_VD, target_R, logsumexp, mean_logit)
        ctx.temperature, ctx.chunk_V = temperature, chunk_V
        return logsumexp, target_logit, mean_logit

    @staticmethod
    def backward(ctx, g_logsumexp, g_target, g_mean):
        hidden_RD, weight_VD, target_R, logsumexp, mean_logit = ctx.saved_tensors
        d_hidden = torch.zeros_like(hidden_RD, dtype=torch.float32)
        d_weight = torch.empty_like(weight_VD)
        constant = g_logsumexp + g_mean * (1 - mean_logit)
        with_entropy = bool(g_mean.any())
        for start in range(0, weight_VD.shape[0], ctx.chunk_V):
            weight = weight_VD[start : start + ctx.chunk_V]
            z = _logits(hidden_RD, weight, ctx.temperature)
            dz = (z - logsumexp[:, None]).exp_()
            dz *= constant[:, None] + g_mean[:, None] * z if with_entropy else constant[:, None]
            inside = (target_R >= start) & (target_R < start + z.shape[1])
            column = torch.where(inside, target_R - start, 0)
            dz.scatter_add_(1, column[:, None], torch.where(inside, g_target, 0.0)[:, None])
            dz = (dz / ctx.temperature).to(weight.dtype)
            d_hidden += dz @ weight
            d_weight[start : start + ctx.chunk_V] = dz.T @ hidden_RD
        return d_hidden.to(hidden_RD.dtype), d_weight, None, None, None


def _logits(hidden_RD: torch.Tensor, weight_VD: torch.Tensor, temperature: float) -> torch.Tensor:
    return (hidden_RD @ weight_VD.T).float().div_(temperature)


def linear_logprob(
    hidden_RD: torch.Tensor, weight_VD: torch.Tensor, target_R: torch.Tensor, *, temperature: float, chunk_V: int = 16384
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See LinearLogprob."""
    return LinearLogprob.apply(hidden_RD, weight_VD, target_R, temperature, chunk_V)
