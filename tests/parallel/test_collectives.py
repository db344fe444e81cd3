"""Sums over context ranks, with their gradient.

Not covered here: the other collectives, which whole runs use (tests/test_trainer.py).
"""

import torch

from grpo_mcore.config import config
from grpo_mcore.parallel import collectives, topology
from tests.dist import spawn


def sums() -> tuple[list[float], list[float], int]:
    """The sum of x over the 2 context ranks, and the gradient of each rank's loss = weight * sum**2 / 2 with weight 10
    * (cp_rank + 1)."""
    topo = topology.connect(config.Parallel(cp=2), device=torch.device("cpu"), timeout_s=60, seed=1)
    x = torch.tensor([1.0, 2.0]) * (topo.rank + 1)
    x.requires_grad_()
    total = collectives.sum_over_context(x, topo)
    (10 * (topo.cp_rank + 1) * total.square() / 2).sum().backward()
    topology.disconnect()
    return total.tolist(), x.grad.tolist(), topo.dp_rank


def test_a_sum_over_context_ranks_has_the_gradient_of_all_their_losses():
    # 4 ranks hold [1, 2] x 1, 2, 3, 4. Context ranks 0, 1 sum to [3, 6], ranks 2, 3 to [7, 14]; both losses of a pair:
    # (10 + 20) x sum.
    for total, gradient, dp_rank in spawn(sums, 4):
        assert total == ([3.0, 6.0] if dp_rank == 0 else [7.0, 14.0])
        assert gradient == [30 * x for x in total]
