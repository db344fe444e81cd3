"""Hidden states to per-token log-prob and entropy: the one path of old, current and reference log-probs.

The caller has chosen the response positions already, so the head never sees a prompt token.
"""

import torch

from grpo_mcore.kernels.pick import pick
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logprob_R, entropy_R) of softmax(hidden @ weight.T / temperature), float32, with gradients for both.

    hidden_RD comes from vocab.rows. weight_VD is this rank's shard of equal rows; rows at or beyond `vocab_size` pad
    the vocabulary and take no part. impl: of the kernel, see kernels/pick.py; ValueError if it cannot run.
    """
    start = vocab.first_row(weight_VD.shape[0], tp_group)
    weight_VD = weight_VD[: max(vocab_size - start, 0)]
    partials = pick(impl, hidden_RD.device)(hidden_RD, weight_VD, target_R - start, temperature=temperature)
    return vocab.combine(*partials, tp_group)
