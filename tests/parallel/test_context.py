"""The zigzag split of context parallelism: a worked example, and that nothing is lost, doubled or moved.

Not covered here: attention over the split (test_policy.py); Transformer Engine's ring.
"""

import random
from dataclasses import fields

import pytest
import torch

from grpo_mcore.parallel import context
from grpo_mcore.types import Microbatch


def batch_of(lengths: list[int], position_R: list[int]) -> Microbatch:
    """Blocks of these lengths; token t has id 100 + t, so that a mix-up shows, and response token k weight k + 1."""
    T, R = sum(lengths), len(position_R)
    return Microbatch(
        token_ids_T=100 + torch.arange(T),
        position_ids_T=torch.cat([torch.arange(n) for n in lengths]),
        branch_T=torch.arange(T) % 3,
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        max_seqlen=max(lengths),
        num_sequences=-(-R // 2),
        position_R=torch.tensor(position_R),
        target_R=101 + torch.tensor(position_R),
        sequence_R=torch.arange(R) // 2,
        advantage_R=torch.arange(R) / 2,
        weight_R=torch.arange(R) + 1.0,
        rollout_logprobs_R=-torch.arange(R) / 4,
        index_R=torch.arange(R),
        old_logprobs_R=-torch.arange(R) / 8,
        importance_R=torch.arange(R) / 16,
    )


def test_the_zigzag_of_a_worked_example():
    # cp = 2: blocks of 8 and 4 tokens in 4 chunks of 2 and 1; rank 0 holds chunks 0 and 3, rank 1 chunks 1 and 2.
    cu_seqlens = torch.tensor([0, 8, 12], dtype=torch.int32)
    assert context.indices(cu_seqlens, 0, 2).tolist() == [0, 1, 6, 7, 8, 11]
    assert context.indices(cu_seqlens, 1, 2).tolist() == [2, 3, 4, 5, 9, 10]
    # cp = 3: 6 chunks of 1
    assert [context.indices(torch.tensor([0, 6]), rank, 3).tolist() for rank in range(3)] == [[0, 5], [1, 4], [2, 3]]
    assert context.indices(torch.tensor([0, 3, 5]), 0, 1).tolist() == [0, 1, 2, 3, 4]
    assert context.indices(cu_seqlens, 0, 2).dtype == torch.int64


def test_response_tokens_follow_the_hidden_state_that_predicts_them():
    # Predicted from tokens 3, 4, 5 and 6 of the first block, 10 of the second: 6 is on rank 0, at its place 2.
    whole = batch_of([8, 4], [3, 4, 5, 6, 10])
    first, second = context.split(whole, 0, 2), context.split(whole, 1, 2)
    assert first.token_ids_T.tolist() == [100, 101, 106, 107, 108, 111]
    assert first.position_ids_T.tolist() == [0, 1, 6, 7, 0, 3]
    assert (first.position_R.tolist(), first.index_R.tolist(), first.target_R.tolist()) == ([2], [3], [107])
    assert second.position_R.tolist() == [1, 2, 3, 5]  # 3, 4, 5, 10 of 2 3 4 5 9 10
    assert second.index_R.tolist() == [0, 1, 2, 4]
    assert second.weight_R.tolist() == [1.0, 2.0, 3.0, 5.0]
    for part in (first, second):
        assert part.cu_seqlens.tolist() == [0, 8, 12] and part.max_seqlen == 8
        assert part.ref_logprobs_R is None


def test_the_split_into_one_part_is_the_whole():
    whole = batch_of([3, 4], [1, 4])
    assert context.split(whole, 0, 1) is whole


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_split_then_merge_is_the_identity(size):
    for seed in range(50):
        rng = random.Random(seed)
        lengths = [2 * size * rng.randint(1, 6) for _ in range(rng.randint(1, 5))]
        # Siblings behind one prompt start from the same hidden state: positions may come twice, and in any order.
        whole = batch_of(lengths, rng.choices(range(sum(lengths)), k=rng.randint(1, 30)))
        parts = [context.split(whole, rank, size) for rank in range(size)]
        places = [context.indices(whole.cu_seqlens, rank, size) for rank in range(size)]
        assert torch.cat(places).sort().values.tolist() == list(range(sum(lengths)))
        for place, part in zip(places, parts, strict=True):
            for name in ("token_ids_T", "position_ids_T", "branch_T"):
                assert torch.equal(getattr(part, name), getattr(whole, name)[place]), name
            assert part.index_R.tolist() == sorted(part.index_R.tolist())
        for name in (
            f.name for f in fields(whole) if f.name.endswith("_R") and f.name not in ("position_R", "ref_logprobs_R")
        ):
            merged = context.merge([(part.index_R, getattr(part, name)) for part in rng.sample(parts, size)])
            assert torch.equal(merged, getattr(whole, name)), name
        predicting = context.merge([(part.index_R, part.token_ids_T[part.position_R]) for part in parts])
        assert torch.equal(predicting, whole.token_ids_T[whole.position_R])


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_rank_attends_to_equally_many_tokens(size):
    whole = batch_of([2 * size * k for k in (1, 5, 2)], [0])
    # A token attends to its position + 1 tokens.
    assert len({(context.split(whole, rank, size).position_ids_T + 1).sum().item() for rank in range(size)}) == 1


def test_a_rank_without_response_tokens_has_empty_fields_of_the_same_types():
    whole = batch_of([8], [2, 3])
    part = context.split(whole, 0, 2)
    for name in (f.name for f in fields(whole) if f.name.endswith("_R") and f.name != "ref_logprobs_R"):
        assert getattr(part, name).tolist() == [], name
        assert getattr(part, name).dtype == getattr(whole, name).dtype, name
    assert part.token_ids_T.tolist() == [100, 101, 106, 107]
    other = context.split(whole, 1, 2)
    assert context.merge([(part.index_R, part.weight_R), (other.index_R, other.weight_R)]).tolist() == [1.0, 2.0]


def test_values_merge_with_their_gradients():
    a, b = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([3.0], requires_grad=True)
    merged = context.merge([(torch.tensor([0, 2]), a), (torch.tensor([1]), b)])
    assert merged.tolist() == [1.0, 3.0, 2.0]
    (merged * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    assert (a.grad.tolist(), b.grad.tolist()) == ([1.0, 100.0], [10.0])


@pytest.mark.parametrize("indices", [([0, 1], [3]), ([0, 1], [1]), ([1], [2]), ([0, 0], [1, 1])])
def test_a_merge_that_misses_or_repeats_a_response_token_is_refused(indices):
    with pytest.raises(ValueError, match="each index from 0 on must come once"):
        context.merge([(torch.tensor(i), torch.zeros(len(i))) for i in indices])


def test_a_block_that_cannot_be_cut_evenly_is_refused():
    with pytest.raises(ValueError, match="a block of 6 tokens: must be a multiple of 2 \\* cp = 4"):
        context.indices(torch.tensor([0, 4, 10]), 0, 2)
