"""The loss-scaling chain: what the policy's loss says is what the optimizer gets, times exactly 1.

Not covered here: every layout (test_policy.py); what the loss's weights are (test_batch.py).
"""

import torch

from grpo_mcore.parallel import collectives, pipeline, topology
from tests.dist import spawn
from tests.policy.test_policy import batch_of, connect, make_policy, whole_gradients

DP, MICROBATCHES = 2, 4


def chains(folder: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(the final norm's gradient after the schedule and DDP, the plain sum of the microbatches' of all ranks) by
    chain."""
    out = {}
    for name in ("ours", "Megatron's default"):
        topo = connect()
        policy = make_policy(folder, topo)
        (m,) = batch_of(topo, max_tokens=10_000).microbatches
        if name == "Megatron's default":
            policy.chunks[0].config.calculate_per_token_loss = False
            for group in policy.modules[0].bucket_groups:  # as DDP sets it then
                for bucket in group.buckets:
                    bucket.gradient_scaling_factor = 1.0 / topo.dp
        norm = policy.chunks[0].decoder.final_layernorm.weight
        (gradient,) = torch.autograd.grad(policy._score(policy.chunks[0], m, 1.0)[0].sum(), norm)  # by autograd alone
        expected = sum(collectives.gather(MICROBATCHES * gradient, topo))
        policy.modules[0].zero_grad_buffer()
        # d loss / d logprob is 1 for every token, in each of the microbatches
        pipeline.run(
            policy.modules,
            [m] * MICROBATCHES,
            lambda chunk, x: policy._score(chunk, x, 1.0),
            lambda output, _: (output[0].sum(), None),
        )
        whole_gradients(policy)
        out[name] = (norm.detach().clone(), expected)
        topology.disconnect(leave=False)
    return out


def test_the_gradient_is_the_plain_sum_over_microbatches_and_data_ranks(model_folders):
    for chain in spawn(chains, DP, model_folders["qwen2_tied"]):
        # The tempting one is a mean over both.
        for name, factor in (("ours", 1), ("Megatron's default", 1 / (DP * MICROBATCHES))):
            seen, expected = chain[name]
            torch.testing.assert_close(seen / factor, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def alone(folder: str) -> dict[str, int]:
    topo = connect()
    policy = make_policy(folder, topo)
    b = batch_of(topo, max_tokens=64)
    calls = []
    outputs = pipeline.run(
        policy.modules, b.microbatches, lambda chunk, m: calls.append(m) or policy._score(chunk, m, 1.0)
    )
    topology.disconnect()
    return {
        "microbatches": len(b.microbatches),
        "calls": len(calls),
        "outputs": len(outputs),
        "in order": [c is m for c, m in zip(calls, b.microbatches, strict=True)],
    }


def test_a_scoring_pass_calls_every_microbatch_once_and_in_order(model_folders):
    (seen,) = spawn(alone, 1, model_folders["qwen2_tied"])
    assert seen["calls"] == seen["outputs"] == seen["microbatches"] > 2 and all(seen["in order"])


def odd_number(folder: str) -> list:
    topo = connect(pp=2, virtual_pp=2)
    policy = make_policy(folder, topo)
    b = batch_of(topo, max_tokens=64)
    odd = b.microbatches[:3]
    three, one = policy.logprobs(odd), policy.logprobs(odd[:1])
    topology.disconnect()
    return [three, one, [m.target_R.numel() for m in odd]]


def test_interleaved_stages_score_a_number_of_microbatches_that_is_no_round_of_them(model_folders):
    first, last = spawn(odd_number, 2, model_folders["qwen2_deep"])
    assert first[0] == [None] * 3 and first[1] == [None]
    assert [len(x) for x in last[0]] == last[2] and torch.equal(last[0][0], last[1][0])
