"""The GRPO loss. Pure: per token in, weighted sum out; the weights carry mask, aggregation and denominator (batch.py).

    clipped surrogate    -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A)       PPO, arXiv 1707.06347, eq. 7;
                         two bounds: DAPO, arXiv 2503.14476, eq. 8
    KL to the reference  k1, k2, k3 of http://joschu.net/blog/kl-approx.html, per token, differentiated as written

    importance           exp(old - rollout), times the surrogate: corrects for tokens that other weights or other arithmetic than the
                         trainer's sampled. Cut at a cap: TIS, Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy
                         RL Training"; set to 0 beyond it: IcePop, ringtech.notion.site/icepop (2025). Per token in both; of a whole response:
                         Liu, Li et al. 2025, "When Speed Kills Stability: Demystifying RL Collapse from the Training-Inference Mismatch".
                         A masked token still counts in the denominator; the KL term is not corrected, as in these.

All exponents are clamped to +-20 before exp, so that one absurd token gives a large loss and not an infinite one.
"""

from collections.abc import Callable

import torch

from grpo_mcore import config
from grpo_mcore.types import Microbatch

EXPONENT_LIMIT = 20.0

# Sums over S sequences [S, ...] of one rank's tokens -> the sums over those of all ranks that share the sequences, with gradient.
OverRanks = Callable[[torch.Tensor], torch.Tensor]


def alone(sums_S: torch.Tensor) -> torch.Tensor:
    """OverRanks of a rank that holds its sequences whole."""
    return sums_S


def grpo(current_logprobs_R: torch.Tensor, batch: Microbatch, cfg: config.Loss) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(loss, per-token statistics [R] without gradient) of one microbatch; loss = sum(weight_R * loss_R)."""
    log_ratio = (current_logprobs_R - batch.old_logprobs_R).clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
    unclipped_loss, clipped_loss = -ratio * batch.advantage_R, -clipped * batch.advantage_R
    loss_R = torch.maximum(unclipped_loss, clipped_loss)
    if batch.importance_R is not None:
        loss_R = batch.importance_R * loss_R
    stats = {"ratio": ratio.detach(), "clip_frac": (clipped_loss > unclipped_loss).float()}
    if cfg.kl_coef > 0:
        kl = kl_to_ref(current_logprobs_R, batch.ref_logprobs_R, cfg.kl_estimator)
        loss_R = loss_R + cfg.kl_coef * kl
        stats["kl_to_ref"] = kl.detach()
    return (batch.weight_R * loss_R).sum(), stats


def importance(batch: Microbatch, cfg: config.Loss, over_ranks: OverRanks = alone) -> tuple[torch.Tensor, torch.Tensor]:
    """(importance_R float32, which of them the cap changed, bool [R]), of old and rollout log-probs; cfg.importance_level is token or sequence."""
    log_weight = batch.old_logprobs_R - batch.rollout_logprobs_R
    if cfg.importance_level == "sequence":
        log_weight = sequence_sum(log_weight, batch, over_ranks)
    weight = log_weight.clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT).exp()
    beyond = weight > cfg.importance_cap
    if cfg.importance_mode == "truncate":
        return weight.clamp(max=cfg.importance_cap).float(), beyond
    beyond |= weight < 1 / cfg.importance_cap
    return weight.masked_fill(beyond, 0.0).float(), beyond


def sequence_sum(values_R: torch.Tensor, batch: Microbatch, over_ranks: OverRanks) -> torch.Tensor:
    """For each token the sum over its response's tokens of `values_R` [R, ...]; float64, so that no order of the tokens shows."""
    sums_S = values_R.new_zeros(batch.num_sequences, *values_R.shape[1:], dtype=torch.float64).index_add(0, batch.sequence_R, values_R.double())
    return over_ranks(sums_S)[batch.sequence_R]


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
