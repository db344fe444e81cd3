"""The GRPO loss. Pure: per token in, weighted sum out; the weights carry mask, aggregation and denominator (batch.py).

    clipped surrogate    -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A)       PPO, arXiv 1707.06347, eq. 7;
                         two bounds: DAPO, arXiv 2503.14476, eq. 8
    KL to the reference  k1, k2, k3 of http://joschu.net/blog/kl-approx.html, per token, differentiated as written

Both exponents are clamped to +-20 before exp, so that one absurd token gives a large loss and not an infinite one.
"""

import torch

from grpo_mcore import config
from grpo_mcore.types import Microbatch

EXPONENT_LIMIT = 20.0


def grpo(current_logprobs_R: torch.Tensor, batch: Microbatch, cfg: config.Loss) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(loss, per-token statistics [R] without gradient) of one microbatch; loss = sum(weight_R * loss_R)."""
    log_ratio = (current_logprobs_R - batch.old_logprobs_R).clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
    unclipped_loss, clipped_loss = -ratio * batch.advantage_R, -clipped * batch.advantage_R
    loss_R = torch.maximum(unclipped_loss, clipped_loss)
    stats = {"ratio": ratio.detach(), "clip_frac": (clipped_loss > unclipped_loss).float()}
    if cfg.kl_coef > 0:
        kl = kl_to_ref(current_logprobs_R, batch.ref_logprobs_R, cfg.kl_estimator)
        loss_R = loss_R + cfg.kl_coef * kl
        stats["kl_to_ref"] = kl.detach()
    return (batch.weight_R * loss_R).sum(), stats


def supervised(current_logprobs_R: torch.Tensor, batch: Microbatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Negative log-likelihood of the responses, with the same weights."""
    return -(batch.weight_R * current_logprobs_R).sum(), {}


def kl_to_ref(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, estimator: str) -> torch.Tensor:
    """Per-token estimate of KL(policy || reference) from tokens that the policy sampled.

    With d = ref - policy:  k1 = -d,  k2 = d^2 / 2,  k3 = exp(d) - 1 - d (unbiased and never negative).
    """
    d = (ref_logprobs - logprobs).clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT)
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return d.square() / 2
    return d.expm1() - d
