"""What is added to graded rewards before they become advantages. Pure.

soft overlong penalty    0 up to L = max_response_tokens - overlong_buffer_tokens, then (L - length) /
                         overlong_buffer_tokens x overlong_penalty, which is -overlong_penalty at max_response_tokens
                             # DAPO, arXiv 2503.14476, section 3.4 (there overlong_penalty is 1)
"""

from collections.abc import Sequence

import torch

from grpo_mcore.config import config
from grpo_mcore.reward.graded import Graded


def shaped(graded: Sequence[Graded], cfg: config.Shaping, max_response_tokens: int) -> torch.Tensor:
    """float32 [P, G]: the rewards, shaped."""
    rewards_PG = torch.tensor([g.rewards for g in graded])
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
