"""Rewards of a group to advantages. Pure.

    mean            (r - mean) / std          GRPO, DeepSeekMath (arXiv 2402.03300), eq. 3
    leave_one_out   (r - mean of the others) / std of the others     RLOO, arXiv 2402.14740, normalised
    no std          the numerator alone       Dr. GRPO, arXiv 2503.20783

Stds are unbiased (Bessel), as both published DeepScaleR runs compute them: the guide's (NeMo RL) is leave_one_out, with
the std of the G - 1 others; the original is mean. Where a std is 0 the advantage is left as it is:
for `mean` it is 0 then; for `leave_one_out` the odd one out among equals keeps its plain difference.
"""

import torch

EPS = 1e-6


def group_advantages(rewards_PG: torch.Tensor, *, baseline: str, normalize_by_std: bool) -> torch.Tensor:
    """advantages_PG, float32, of rewards_PG with G >= 2.

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), baseline="mean", normalize_by_std=False)
    tensor([[ 0.7500, -0.2500, -0.2500, -0.2500]])
    """
    rewards = rewards_PG.double()  # 16 responses of reward 1 have a std of exactly 0
    G = rewards.shape[1]
    mean = rewards.mean(1, keepdim=True)
    if baseline == "mean":
        advantages = rewards - mean
        std = rewards.std(1, keepdim=True).expand_as(rewards)
    else:
        advantages = (rewards - mean) * G / (G - 1)
        others = (rewards.sum(1, keepdim=True) - rewards) / (G - 1)
        squares = ((rewards**2).sum(1, keepdim=True) - rewards**2) - (G - 1) * others**2
        std = (squares.clamp(min=0) / max(G - 2, 1)).sqrt()
    if normalize_by_std:
        advantages = torch.where(std > EPS, advantages / (std + EPS), advantages)
    return advantages.float()
