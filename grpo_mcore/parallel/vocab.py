"""Log-prob and entropy over a vocabulary that is split over tp ranks.

Each rank's kernel reduces its shard to three numbers a token (kernels/reference.py); here they meet. The gradient rule
on both sides follows Megatron: downstream of the gather every tp rank computes the same loss, so the gradient of the
gathered values is complete on each rank and its own slice is taken without a sum (tensor_parallel_output_grad=False);
upstream, each rank's gradient of the hidden state covers only its own shard of the vocabulary, so it is summed.
"""

import torch
import torch.distributed as dist


class _ToShards(torch.autograd.Function):
    """Identity forward; sum over tp ranks backward."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def rows(
    hidden_TD: torch.Tensor, position_R: torch.Tensor, group: dist.ProcessGroup | None, *, sequence_parallel: bool
) -> torch.Tensor:
    """hidden_RD of the given positions, as every rank's head may read them. group None: the vocabulary is not split.

    With sequence_parallel, hidden_TD is this rank's T/tp tokens: gathered here, and in the backward summed and
    scattered.
    """
    if sequence_parallel:
        from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

        return gather_from_sequence_parallel_region(hidden_TD, group=group)[position_R]
    hidden_RD = hidden_TD[position_R]
    return hidden_RD if group is None else _ToShards.apply(hidden_RD, group)


def first_row(rows: int, group: dist.ProcessGroup | None) -> int:
    """The vocabulary id of this rank's first row, for shards of `rows` rows."""
    return 0 if group is None else rows * dist.get_rank(group)


def combine(
    logsumexp_R: torch.Tensor, target_R: torch.Tensor, mean_logit_R: torch.Tensor, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Partials of each shard, as `whole` takes them, to (logprob_R, entropy_R) of the whole vocabulary, float32,
    differentiable."""
    logsumexp_R, target_R, mean_logit_R = whole(logsumexp_R, target_R, mean_logit_R, group)
    return target_R - logsumexp_R, logsumexp_R - mean_logit_R


def whole(
    logsumexp_R: torch.Tensor, target_R: torch.Tensor, mean_logit_R: torch.Tensor, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Partials of each shard to those of the whole vocabulary, differentiable.

    logsumexp_R: over the shard; target_R: the target's logit where the shard has it, else 0;
    mean_logit_R: the shard's expected logit under the softmax of the shard alone.
    """
    if group is None:
        return logsumexp_R, target_R, mean_logit_R
    from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

    partials_3R = torch.stack([logsumexp_R, target_R, mean_logit_R])
    gathered = gather_from_sequence_parallel_region(partials_3R, tensor_parallel_output_grad=False, group=group)
    logsumexp_KR, target_KR, mean_logit_KR = gathered.view(group.size(), *partials_3R.shape).unbind(1)
    logsumexp = torch.logsumexp(logsumexp_KR, 0)
    # These sum to 1, where exp(logsumexp_KR - logsumexp) has the rounding of two large numbers.
    share_KR = logsumexp_KR.softmax(0)
    return logsumexp, target_KR.sum(0), (share_KR * mean_logit_KR).sum(0)
