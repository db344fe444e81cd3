"""Hidden states to per-token log-prob and entropy: the one path of old, current and reference log-probs. Of a policy it
is one of two (kernels/pick.py): the log-probs come first and the loss's gradient through them, or both at once.

The caller has chosen the response positions already, so the head never sees a prompt token.
"""

import functools

import torch

from grpo_mcore.kernels.linear_grpo import Loss
from grpo_mcore.kernels.pick import LinearGrpo, pick
from grpo_mcore.parallel import vocab


def logprobs_and_entropy(
    hidden_RD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_R: torch.Tensor,
    *,
    temperature: float,
    vocab_size: int,
    tp_group=None,
    impl: str = "auto",
    workspace_bytes: int | None = None,
    main_grad_VD: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logprob_R, entropy_R) of softmax(hidden @ weight.T / temperature), float32, with gradients for both.

    hidden_RD comes from vocab.rows. weight_VD is this rank's shard of equal rows; rows at or beyond `vocab_size` pad
    the vocabulary and take no part. impl, workspace_bytes: see kernels/pick.py; ValueError if it cannot run.
    main_grad_VD: the weight's, if its gradient shall be added there, see kernels/reference.py.
    """
    start = vocab.first_row(weight_VD.shape[0], tp_group)
    weight_VD, main_grad_VD = _without_padding(weight_VD, main_grad_VD, vocab_size - start)
    partials = pick(impl, hidden_RD.device, workspace_bytes)(
        hidden_RD, weight_VD, target_R - start, temperature=temperature, main_grad_VD=main_grad_VD
    )
    return vocab.combine(*partials, tp_group)


def loss_and_logprobs(
    linear_grpo: LinearGrpo,
    hidden_RD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_R: torch.Tensor,
    loss: Loss | None,
    *,
    temperature: float,
    vocab_size: int,
    tp_group=None,
    main_grad_VD: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """(loss with gradients, logprob_R, entropy_R without); `loss` None: of a scoring pass. The rest as above."""
    rows_V = weight_VD.shape[0]
    start = vocab.first_row(rows_V, tp_group)
    weight_VD, main_grad_VD = _without_padding(weight_VD, main_grad_VD, vocab_size - start)
    return linear_grpo(
        hidden_RD,
        weight_VD,
        target_R - start,
        loss,
        temperature=temperature,
        main_grad_VD=main_grad_VD,
        of_shards=functools.partial(vocab.whole, group=tp_group),
        rows_V=rows_V,
    )


def _without_padding(weight_VD: torch.Tensor, main_grad_VD: torch.Tensor | None, rows: int):
    """Where nothing is padded, the weight itself: a slice's gradient is copied into one of the whole."""
    if rows >= weight_VD.shape[0]:
        return weight_VD, main_grad_VD
    rows = max(rows, 0)
    return weight_VD[:rows], None if main_grad_VD is None else main_grad_VD[:rows]
