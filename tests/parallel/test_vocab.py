"""Log-probs over a vocabulary split over 4 ranks against the whole, values and gradients.

Not covered here: the kernels' own arithmetic (tests/kernels).
"""

import pytest
import torch

from grpo_mcore.logprob import logprobs_and_entropy
from grpo_mcore.parallel import topology
from tests.dist import spawn

R, D, V = 13, 8, 37  # 37 over 4 ranks: shards of 10 rows, the last with 3 rows of padding


def inputs() -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(3)
    return (torch.randn(R, D, generator=g), torch.randn(V, D, generator=g), torch.randint(0, V, (R,), generator=g),
            torch.randn(R, generator=g), torch.randn(R, generator=g))


def on_shard(tp: int) -> dict[str, torch.Tensor]:
    hidden, weight, target, g_logprob, g_entropy = inputs()
    topo = topology.connect(tp=tp, device=torch.device("cpu"), timeout_s=60, seed=1)
    rows = -(-V // tp)
    padded = torch.cat([weight, torch.full((rows * tp - V, D), 50.0)])  # padding that would win every softmax
    shard = padded[topo.tp_rank * rows : (topo.tp_rank + 1) * rows].clone().requires_grad_()
    hidden.requires_grad_()
    logprob, entropy = logprobs_and_entropy(hidden, shard, target, temperature=0.7, vocab_size=V, tp_group=topo.tp_group if tp > 1 else None)
    ((logprob * g_logprob).sum() + (entropy * g_entropy).sum()).backward()
    topology.disconnect()
    return {"logprob": logprob.detach(), "entropy": entropy.detach(), "d_hidden": hidden.grad, "d_weight": shard.grad}


@pytest.mark.parametrize("tp", [1, 4])
def test_values_and_gradients_equal_the_float64_softmax_of_the_whole_vocabulary(tp):
    hidden, weight, target, g_logprob, g_entropy = (x.double() if x.is_floating_point() else x for x in inputs())
    hidden.requires_grad_()
    weight.requires_grad_()
    log_p = (hidden @ weight.T / 0.7).log_softmax(-1)
    logprob, entropy = log_p.gather(1, target[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    ((logprob * g_logprob).sum() + (entropy * g_entropy).sum()).backward()
    ranks = spawn(on_shard, tp, tp)
    for seen in ranks:
        # float32 with log-probs of about 20: a few ulp of 20
        torch.testing.assert_close(seen["logprob"].double(), logprob.detach(), atol=2e-5, rtol=0)
        torch.testing.assert_close(seen["entropy"].double(), entropy.detach(), atol=2e-5, rtol=0)
        torch.testing.assert_close(seen["d_hidden"].double(), hidden.grad, atol=5e-5, rtol=0)
    d_weight = torch.cat([seen["d_weight"] for seen in ranks])
    torch.testing.assert_close(d_weight[:V].double(), weight.grad, atol=5e-5, rtol=0)
    assert (d_weight[V:] == 0).all()
