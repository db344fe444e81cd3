"""Rewards and what is added to them: worked numbers.

Not covered here: that advantages are made of the shaped rewards (tests/test_trainer.py).
"""

import torch

from grpo_mcore.config import config
from grpo_mcore.reward.graded import Graded
from grpo_mcore.reward.grader import Status, Verdict
from grpo_mcore.reward.shaping import shaped
from grpo_mcore.types import Group, Prompt, Response

GROUPS = [
    Group(Prompt(p, "", "", (1,)), tuple(Response((7,) * n, (0.0,) * n, n == 100, 0) for n in lengths))
    for p, lengths in enumerate([(1, 80, 81), (90, 99, 100)])
]
REWARDS_PG = [[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
GRADED = [
    Graded(p, group, tuple(Verdict(reward, Status.WRONG, None, "") for reward in rewards))
    for p, (group, rewards) in enumerate(zip(GROUPS, REWARDS_PG, strict=True))
]


def test_the_soft_overlong_penalty_grows_linearly_over_the_buffer():
    # 100 - 20 = 80 tokens are free; then 1/20 a token, to 1 at the limit; times 0.5
    cfg = config.Shaping(overlong_buffer_tokens=20, overlong_penalty=0.5)
    penalties = shaped(GRADED, config.Reward(), cfg, 100) - torch.tensor(REWARDS_PG)
    torch.testing.assert_close(penalties, torch.tensor([[0.0, 0.0, -0.025], [-0.25, -0.475, -0.5]]), atol=1e-7, rtol=0)


def test_without_a_buffer_rewards_stay_what_they_are():
    assert torch.equal(shaped(GRADED, config.Reward(), config.Shaping(), 100), torch.tensor(REWARDS_PG))


def test_a_response_beyond_the_limit_is_punished_no_more_than_one_at_it():
    cfg = config.Shaping(overlong_buffer_tokens=10)
    assert shaped(GRADED, config.Reward(), cfg, 90).tolist()[1] == [0.0, -1.0, -1.0]
