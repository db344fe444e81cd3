"""Log-probs over a vocabulary split over 4 ranks against the whole, values and gradients.

Not covered here: the kernels' own arithmetic (tests/kernels).
"""

import pytest
import torch

from grpo_mcore.config import config
from grpo_mcore.parallel import topology, vocab
from grpo_mcore.policy.logprob import logprobs_and_entropy
from tests.dist import spawn

R, D, V = 13, 8, 37  # 37 over 4 ranks: shards of 10 rows, the last with 3 rows of padding


def inputs() -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(3)
    return (
        torch.randn(R, D, generator=g),
        torch.randn(V, D, generator=g),
        torch.randint(0, V, (R,), generator=g),
        torch.randn(R, generator=g),
        torch.randn(R, generator=g),
    )


def on_shard(tp: int, sequence_parallel: bool) -> dict[str, torch.Tensor]:
    hidden, weight, target, g_logprob, g_entropy = inputs()
    topo = topology.connect(config.Parallel(tp=tp), device=torch.device("cpu"), timeout_s=60, seed=1)
    rows = -(-V // tp)
    padded = torch.cat([weight, torch.full((rows * tp - V, D), 50.0)])  # padding that would win every softmax
    shard = padded[topo.tp_rank * rows : (topo.tp_rank + 1) * rows].clone().requires_grad_()
    # Position R is padding that nobody asks for, to make equal parts; the positions asked for are in reverse.
    hidden = torch.cat([hidden.flip(0), torch.zeros(-R % tp, D)])
    if sequence_parallel:
        hidden = hidden.chunk(tp)[topo.tp_rank].clone()
    hidden.requires_grad_()
    asked = vocab.rows(hidden, torch.arange(R).flip(0), topo.head_group, sequence_parallel=sequence_parallel)
    logprob, entropy = logprobs_and_entropy(
        asked, shard, target, temperature=0.7, vocab_size=V, tp_group=topo.head_group
    )
    ((logprob * g_logprob).sum() + (entropy * g_entropy).sum()).backward()
    topology.disconnect()
    return {"logprob": logprob.detach(), "entropy": entropy.detach(), "d_hidden": hidden.grad, "d_weight": shard.grad}


@pytest.mark.parametrize(("tp", "sequence_parallel"), [(1, False), (4, False), (4, True)])
def test_values_and_gradients_equal_the_float64_softmax_of_the_whole_vocabulary(tp, sequence_parallel):
    hidden, weight, target, g_logprob, g_entropy = (x.double() if x.is_floating_point() else x for x in inputs())
    hidden.requires_grad_()
    weight.requires_grad_()
    log_p = (hidden @ weight.T / 0.7).log_softmax(-1)
    logprob, entropy = log_p.gather(1, target[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    ((logprob * g_logprob).sum() + (entropy * g_entropy).sum()).backward()
    ranks = spawn(on_shard, tp, tp, sequence_parallel)
    for seen in ranks:
        # float32 with log-probs of about 20: a few ulp of 20
        torch.testing.assert_close(seen["logprob"].double(), logprob.detach(), atol=2e-5, rtol=0)
        torch.testing.assert_close(seen["entropy"].double(), entropy.detach(), atol=2e-5, rtol=0)
    parts = [seen["d_hidden"] for seen in ranks]
    for d_hidden in [torch.cat(parts)] if sequence_parallel else parts:
        torch.testing.assert_close(d_hidden[:R].flip(0).double(), hidden.grad, atol=5e-5, rtol=0)
    d_weight = torch.cat([seen["d_weight"] for seen in ranks])
    torch.testing.assert_close(d_weight[:V].double(), weight.grad, atol=5e-5, rtol=0)
    assert (d_weight[V:] == 0).all()
