"""The GRPO losses. Pure: per token in, weighted sum out; the weights carry mask, aggregation and denominator
(batch.py).

    policy_loss  ppo_clip  -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A)    PPO, arXiv 1707.06347, eq. 7;
                           two bounds (clip-higher): DAPO, arXiv 2503.14476, eq. 8
                 gspo      the same with the geometric mean of a response's ratios for the ratio of each of its tokens:
                           GSPO, arXiv 2507.18071, eq. 5, with aggregation sequence_mean and clips of 3e-4 / 4e-4
                 cispo     -clip(ratio, 1 - clip_low, 1 + clip_high) A logprob, the clipped ratio without gradient:
                           CISPO, MiniMax-M1, arXiv 2506.13585, eq. 4, without a lower clip (clip_low 1)
    clip_dual    where A < 0, no more than -clip_dual A: Ye et al. 2020, arXiv 1912.09729 (dual-clip PPO)
    kl_coef      k1, k2, k3 of http://joschu.net/blog/kl-approx.html to the reference, per token, differentiated as
                 written; kl_limit clamps the estimate, whose gradient is 0 beyond (both published DeepScaleR runs: 10)
    entropy_coef minus the entropy of each token's distribution, differentiated (original DeepScaleR: 0.001)
    importance_* exp(old - rollout), times the policy loss: corrects for tokens that other weights or other arithmetic
                 than the trainer's sampled. Cut at a cap: TIS, Yao et al. 2025, "Your Efficient RL Framework Secretly
                 Brings You Off-Policy RL Training"; set to 0 beyond it: IcePop, ringtech.notion.site/icepop (2025). Per
                 token in both; of a whole response: Liu, Li et al. 2025, "When Speed Kills Stability: Demystifying RL
                 Collapse from the Training-Inference Mismatch". A masked token still counts in the denominator; KL and
                 entropy are not corrected, as in these.

All exponents are clamped to +-20 before exp, so that one absurd token gives a large loss and not an infinite one.

Declared deviation: the original DeepScaleR run means over the tokens of each micro-batch and sums the means, so that
its loss depends on how a batch is cut. That is not built; its configurations here have token_mean, over the whole batch
of an optimizer step.
"""

import dataclasses
from collections.abc import Callable

import torch

from grpo_mcore.config import config
from grpo_mcore.config.config import EXPONENT_LIMIT
from grpo_mcore.types import Microbatch

# Sums over S sequences [S, ...] of one rank's tokens -> the sums over those of all ranks that share the sequences, with
# gradient.
OverRanks = Callable[[torch.Tensor], torch.Tensor]


def alone(sums_S: torch.Tensor) -> torch.Tensor:
    """OverRanks of a rank that holds its sequences whole."""
    return sums_S


def grpo(
    current_logprobs_R: torch.Tensor,
    entropy_R: torch.Tensor,
    batch: Microbatch,
    cfg: config.Loss,
    over_ranks: OverRanks = alone,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(loss, per-token statistics [R] without gradient) of one microbatch; loss = sum(weight_R * loss_R)."""
    loss_R, stats = policy_loss(current_logprobs_R, batch, cfg, over_ranks)
    if batch.importance_R is not None:
        loss_R = batch.importance_R * loss_R
    if cfg.kl_coef > 0:
        assert batch.ref_logprobs_R is not None
        kl = kl_to_ref(current_logprobs_R, batch.ref_logprobs_R, cfg.kl_estimator)
        if cfg.kl_limit is not None:
            kl = kl.clamp(-cfg.kl_limit, cfg.kl_limit)
        loss_R = loss_R + cfg.kl_coef * kl
        stats["kl_to_ref"] = kl.detach()
    if cfg.entropy_coef > 0:
        loss_R = loss_R - cfg.entropy_coef * entropy_R
    return (batch.weight_R * loss_R).sum(), stats


def is_pointwise(cfg: config.Loss) -> bool:
    """Whether each token's part of `grpo` needs that token's log-prob and entropy alone, so that the loss of a
    microbatch is the sum of its rows'. GSPO's ratio needs those of its whole response; importance weights are data."""
    return cfg.policy_loss != "gspo"


def of_rows(batch: Microbatch, rows: slice) -> Microbatch:
    """The microbatch with these of its R response tokens alone, for a pointwise loss."""
    per_token = {
        f.name: x
        for f in dataclasses.fields(batch)
        if f.name.endswith("_R") and (x := getattr(batch, f.name)) is not None
    }
    return dataclasses.replace(batch, **{name: x[rows] for name, x in per_token.items()})


def policy_loss(
    current_logprobs_R: torch.Tensor, batch: Microbatch, cfg: config.Loss, over_ranks: OverRanks
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(loss_R of cfg.policy_loss, its statistics)."""
    assert batch.old_logprobs_R is not None
    log_ratio, advantage = current_logprobs_R - batch.old_logprobs_R, batch.advantage_R
    if cfg.policy_loss == "gspo":
        summands = torch.stack([log_ratio, torch.ones_like(log_ratio)], -1)
        log_ratio, length = sequence_sum(summands, batch, over_ranks).unbind(-1)
        log_ratio = (log_ratio / length).to(current_logprobs_R.dtype)
    ratio = log_ratio.clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT).exp()
    clipped = ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
    if cfg.policy_loss == "cispo":
        stats = {"ratio": ratio.detach(), "clip_frac": (clipped != ratio).float()}
        return -clipped.detach() * advantage * current_logprobs_R, stats
    unclipped_loss, clipped_loss = -ratio * advantage, -clipped * advantage
    loss_R = torch.maximum(unclipped_loss, clipped_loss)
    stats = {"ratio": ratio.detach(), "clip_frac": (clipped_loss > unclipped_loss).float()}
    if cfg.clip_dual is not None:
        bounded = (advantage < 0) & (ratio > cfg.clip_dual)
        loss_R = torch.where(bounded, -cfg.clip_dual * advantage, loss_R)
        stats["clip_dual_frac"] = bounded.float()
    return loss_R, stats


def importance(batch: Microbatch, cfg: config.Loss, over_ranks: OverRanks = alone) -> tuple[torch.Tensor, torch.Tensor]:
    """(importance_R float32, which of them the cap changed, bool [R]), of old and rollout log-probs;
    cfg.importance_level is token or sequence."""
    assert batch.old_logprobs_R is not None
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
    """For each token the sum over its response's tokens of `values_R` [R, ...]; float64, so that no order of the tokens
    shows."""
    zeros_S = values_R.new_zeros(batch.num_sequences, *values_R.shape[1:], dtype=torch.float64)
    return over_ranks(zeros_S.index_add(0, batch.sequence_R, values_R.double()))[batch.sequence_R]


def supervised(
    current_logprobs_R: torch.Tensor, entropy_R: torch.Tensor, batch: Microbatch
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
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
