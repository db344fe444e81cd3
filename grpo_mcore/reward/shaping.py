"""What becomes of graded rewards before they become advantages. Pure.

normalized_sum           sum over the functions of weight x (value - mean) / std, of the values within the group
                             # GDPO, arXiv 2601.05242
soft overlong penalty    0 up to L = max_response_tokens - overlong_buffer_tokens, then (L - length) /
                         overlong_buffer_tokens x overlong_penalty, which is -overlong_penalty at max_response_tokens
                             # DAPO, arXiv 2503.14476, section 3.4 (there overlong_penalty is 1)
"""

import math
from collections.abc import Sequence

import torch

from grpo_mcore.config import config
from grpo_mcore.reward.graded import Graded

EPS = 1e-6  # as of advantages: below it values are equal


def combined(g: Graded, cfg: config.Reward) -> list[float]:
    """A group's G rewards, of its functions' values as reward.combine says."""
    if cfg.combine == "sum":
        return g.rewards
    by_function = zip(*([part.value for part in v.parts] for v in g.verdicts), strict=True)
    of_each = [[f.weight * v for v in normalised(values)] for f, values in zip(cfg.functions, by_function, strict=True)]
    return [sum(values) for values in zip(*of_each, strict=True)]


def normalised(values: Sequence[float | None]) -> list[float]:
    """One function's values within a group: with mean 0 and standard deviation 1 (unbiased), where they differ; 0
    where there is none.

    >>> normalised([1.0, None, 3.0])
    [-0.7071067811865475, 0.0, 0.7071067811865475]
    """
    there = [v for v in values if v is not None]
    mean = sum(there) / len(there) if there else 0.0
    std = math.sqrt(sum((v - mean) ** 2 for v in there) / max(len(there) - 1, 1))
    return [0.0 if v is None or std < EPS else (v - mean) / std for v in values]


def shaped(
    graded: Sequence[Graded], reward: config.Reward, cfg: config.Shaping, max_response_tokens: int
) -> torch.Tensor:
    """float32 [P, G]: the rewards, combined and shaped."""
    rewards_PG = torch.tensor([combined(g, reward) for g in graded])
    if not cfg.overlong_buffer_tokens:
        return rewards_PG
    lengths_PG = torch.tensor([[len(r.token_ids) for r in g.group.responses] for g in graded])
    return rewards_PG + soft_overlong(lengths_PG, max_response_tokens, cfg.overlong_buffer_tokens, cfg.overlong_penalty)


def soft_overlong(
    lengths_PG: torch.Tensor, max_response_tokens: int, buffer_tokens: int, penalty: float
) -> torch.Tensor:
    """float32 [P, G], 0 or less, of lengths in tokens.

    >>> soft_overlong(torch.tensor([[80, 90, 100]]), max_response_tokens=100, buffer_tokens=20, penalty=1.0).tolist()
    [[0.0, -0.5, -1.0]]
    """
    over = (lengths_PG - (max_response_tokens - buffer_tokens)) / buffer_tokens
    return -penalty * over.clamp(0, 1)
