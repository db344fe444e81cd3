"""Groups to packed microbatches: the examples of types.py, the rules of the packing, and the ONE loss denominator.

Not covered here: that Megatron's gradient keeps to these weights (test_policy.py), the split over context ranks by
itself (parallel/test_context.py).
"""

import math
import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from grpo_mcore.loss.batch import Cost, Packing, Sample, assemble, blocks, microbatch, pack, pack_in_order
from grpo_mcore.parallel import context
from grpo_mcore.types import GlobalBatch, Group, Prompt, Response

EOS = 99


def group(prompt_id: int, prompt: tuple[int, ...], *responses: tuple[int, ...]) -> Group:
    """Its tokens' rollout log-probs are minus the tokens, so that a mix-up shows."""
    return Group(
        Prompt(prompt_id, "", "", prompt),
        tuple(Response(r, tuple(-float(t) for t in r), truncated=r[-1] != EOS) for r in responses),
    )


def cut(groups: list[Group], packing: Packing, advantages: torch.Tensor | None = None, **kwargs) -> list[GlobalBatch]:
    """`assemble`, unless said otherwise of one optimizer step, with token_mean and advantages of 0."""
    if advantages is None:
        advantages = torch.zeros(len(groups), len(groups[0].responses))
    usual = {"global_batch_size": advantages.numel(), "aggregation": "token_mean", "max_response_tokens": 20}
    return assemble(groups, advantages, packing=packing, **{**usual, **kwargs})


def test_the_worked_example_of_types():
    seven, plus, five, equals = 7, 10, 5, 11
    prompt = (seven, plus, five, equals)
    (batch,) = cut([group(0, prompt, (1, 2, EOS), (1, 3))], Packing(max_tokens=13), torch.tensor([[0.5, -0.5]]))
    (m,) = batch.microbatches
    assert m.token_ids_T.tolist() == [*prompt, 1, 2, EOS, *prompt, 1, 3]
    assert m.position_ids_T.tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5]
    assert m.cu_seqlens.tolist() == [0, 7, 13]
    assert m.branch_T.tolist() == [0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1]
    assert m.max_seqlen == 7
    assert m.position_R.tolist() == [3, 4, 5, 10, 11]
    assert m.target_R.tolist() == [1, 2, EOS, 1, 3]
    assert m.sequence_R.tolist() == [0, 0, 0, 1, 1]
    assert m.advantage_R.tolist() == [0.5, 0.5, 0.5, -0.5, -0.5]
    assert m.weight_R.tolist() == [torch.tensor(1 / 5).item()] * 5  # 5 response tokens, in float32
    assert m.rollout_logprobs_R.tolist() == [-1.0, -2.0, -99.0, -1.0, -3.0]
    assert m.index_R.tolist() == [0, 1, 2, 3, 4]
    assert m.old_logprobs_R is None and m.ref_logprobs_R is None
    assert (batch.num_loss_tokens, batch.num_tokens) == (5, 13)
    int64 = (m.token_ids_T, m.position_ids_T, m.branch_T, m.position_R, m.target_R, m.sequence_R, m.index_R)
    assert {x.dtype for x in int64} == {torch.int64}
    assert m.cu_seqlens.dtype == torch.int32  # what flash attention demands


def test_the_worked_example_of_two_turns():
    seven, plus, five, equals = 7, 10, 5, 11
    logprobs = (-0.1, -0.2, -0.3, -0.4, -0.5, -0.6)
    two = Response((5, plus, 4, EOS, 9, 9, EOS), logprobs, False, given=((4, 5),))
    one = Response((1, EOS), (-0.7, -0.8), False)
    g = Group(Prompt(0, "", "", (seven, plus, five, equals)), (two, one))
    for aggregation, weights in (("token_mean", (1 / 8, 1 / 8)), ("sequence_mean", (1 / 12, 1 / 4))):
        (b,) = cut([g], Packing(max_tokens=17), torch.tensor([[0.5, -0.5]]), aggregation=aggregation)
        (m,) = b.microbatches
        assert m.token_ids_T.tolist()[:11] == [seven, plus, five, equals, 5, plus, 4, EOS, 9, 9, EOS]
        assert m.position_ids_T.tolist()[:11] == list(range(11))
        assert m.target_R.tolist() == [5, plus, 4, EOS, 9, EOS, 1, EOS]
        assert m.position_R.tolist() == [3, 4, 5, 6, 8, 9, 14, 15]
        assert m.sequence_R.tolist() == [0] * 6 + [1] * 2
        assert torch.equal(m.rollout_logprobs_R, torch.tensor([*logprobs, -0.7, -0.8]))
        assert torch.equal(m.weight_R, torch.tensor([weights[0]] * 6 + [weights[1]] * 2))
        assert (b.num_loss_tokens, b.num_tokens) == (8, 17)


def test_a_response_may_have_a_prompt_of_its_own():
    own = Prompt(0, "", "", (5, 6, 7))
    pair = Response((1,), (-0.1,), False, prompt=own), Response((2,), (-0.2,), False)
    (b,) = cut([Group(Prompt(0, "", "", (8,)), pair)], Packing(max_tokens=6, share_prompts=True))
    (m,) = b.microbatches
    assert (m.token_ids_T.tolist(), m.cu_seqlens.tolist()) == ([5, 6, 7, 1, 8, 2], [0, 4, 6])
    assert (m.position_R.tolist(), b.num_tokens) == ([2, 4], 6)


def test_a_response_that_ends_or_begins_with_what_was_given():
    r = Response((1, 2, 3, 4), (-0.1, -0.2), False, given=((0, 1), (3, 4)))
    (b,) = cut([Group(Prompt(0, "", "", (5, 6)), (r, r))], Packing(max_tokens=12))
    (m,) = b.microbatches
    assert (m.target_R.tolist(), m.position_R.tolist()) == ([2, 3, 2, 3], [2, 3, 8, 9])


def test_the_worked_example_with_a_shared_prompt():
    prompt = (7, 10, 5, 11)
    (batch,) = cut(
        [group(0, prompt, (1, 2, EOS), (1, 3))], Packing(max_tokens=9, share_prompts=True), torch.tensor([[0.5, -0.5]])
    )
    (m,) = batch.microbatches
    assert m.token_ids_T.tolist() == [*prompt, 1, 2, EOS, 1, 3]
    assert m.branch_T.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2]
    assert m.position_ids_T.tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5]
    assert m.cu_seqlens.tolist() == [0, 9] and m.max_seqlen == 7
    assert m.position_R.tolist() == [3, 4, 5, 3, 7]
    assert m.target_R.tolist() == [1, 2, EOS, 1, 3]
    assert m.sequence_R.tolist() == [0, 0, 0, 1, 1]
    assert m.advantage_R.tolist() == [0.5, 0.5, 0.5, -0.5, -0.5]
    assert m.rollout_logprobs_R.tolist() == [-1.0, -2.0, -99.0, -1.0, -3.0]
    assert batch.num_tokens == 13  # of sequences, each with its prompt


def test_the_worked_example_on_two_context_ranks():
    prompt = (7, 10, 5, 11)
    m0, m1 = (
        cut(
            [group(0, prompt, (1, 2, EOS), (1, 3))],
            Packing(max_tokens=8, cp=2, cp_rank=rank),
            torch.tensor([[0.5, -0.5]]),
        )[0].microbatches[0]
        for rank in range(2)
    )
    # 7 and 6 tokens, padded to multiples of 2 * cp = 4: 8 and 8, cut in chunks of 2. Rank 0: chunks 0 and 3, rank 1: 1
    # and 2.
    assert m0.token_ids_T.tolist() == [7, 10, EOS, 0, 7, 10, 0, 0]
    assert m1.token_ids_T.tolist() == [5, 11, 1, 2, 5, 11, 1, 3]
    assert m0.position_ids_T.tolist() == [0, 1, 6, 7, 0, 1, 6, 7]
    assert m1.position_ids_T.tolist() == [2, 3, 4, 5, 2, 3, 4, 5]
    assert m0.branch_T.tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert m1.branch_T.tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    for m in (m0, m1):
        assert m.cu_seqlens.tolist() == [0, 8, 16] and m.max_seqlen == 8
    assert m0.index_R.tolist() == m0.position_R.tolist() == m0.weight_R.tolist() == []
    assert m1.index_R.tolist() == [0, 1, 2, 3, 4]
    assert m1.position_R.tolist() == [1, 2, 3, 5, 6]  # =, 1, 2 and =, 1
    assert m1.target_R.tolist() == [1, 2, EOS, 1, 3]
    assert m1.weight_R.tolist() == [torch.tensor(1 / 5).item()] * 5


def samples_of(*responses: tuple[int, ...], prompt: tuple[int, ...] = (7, 10)) -> list[Sample]:
    (g,) = [group(0, prompt, *responses)]
    return [Sample(g.prompt, r, 1.0) for r in g.responses]


def test_only_the_last_block_is_padded_to_the_alignment_and_padding_goes_on_with_it():
    samples = samples_of((1, 2, 3), (4,))  # 5 and 3 tokens
    # cp = 1: blocks are left as they are, 8 tokens to a multiple of 5 make 10
    m = microbatch(samples, [1.0, 1.0], Packing(max_tokens=10, align_tokens=5))
    assert m.token_ids_T.tolist() == [7, 10, 1, 2, 3, 7, 10, 4, 0, 0]
    assert m.position_ids_T.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]
    assert m.branch_T.tolist() == [0, 0, 1, 1, 1, 0, 0, 1, 1, 1]
    assert m.cu_seqlens.tolist() == [0, 5, 10]
    assert m.position_R.tolist() == [1, 2, 3, 6] and m.target_R.tolist() == [1, 2, 3, 4]
    # cp = 2: each to a multiple of 4, 8 and 4; their 12 to a multiple of lcm(2 * 5, 4) = 20, so that a rank has 10
    for rank in range(2):
        m = microbatch(samples, [1.0, 1.0], Packing(max_tokens=10, cp=2, cp_rank=rank, align_tokens=5))
        assert m.cu_seqlens.tolist() == [0, 8, 20] and m.max_seqlen == 12
        assert m.token_ids_T.numel() == 10
    # A shared prompt, 2 + 3 + 1 tokens: padding goes on with the second response, as long a sequence as 2 + 1 + 4.
    m = microbatch(samples, [1.0, 1.0], Packing(max_tokens=10, align_tokens=10, share_prompts=True))
    assert m.token_ids_T.tolist() == [7, 10, 1, 2, 3, 4, 0, 0, 0, 0]
    assert m.position_ids_T.tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 5, 6]
    assert m.branch_T.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2, 2]
    assert m.cu_seqlens.tolist() == [0, 10] and m.max_seqlen == 7


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_shared_packing_keeps_every_sample_once_within_the_bound_and_order(ranks):
    rng = random.Random(ranks)
    for _ in range(20):
        groups, advantages = random_groups(rng, P=8, G=4)
        seen, counts = [], set()
        for rank in range(ranks):
            (batch,) = cut(
                groups,
                Packing(
                    max_tokens=60, dp=ranks, dp_rank=rank, align_tokens=8, microbatch_multiple=2, share_prompts=True
                ),
                advantages,
                global_batch_size=32,
            )
            counts.add(len(batch.microbatches))
            for m in batch.microbatches:
                assert 0 < m.token_ids_T.numel() <= 60 and m.token_ids_T.numel() % 8 == 0
                seen += m.target_R.tolist()
        assert len(counts) == 1 and counts.pop() % 2 == 0
        assert seen == [t for g in groups for r in g.responses for t in r.token_ids]


def test_long_responses_keep_their_prompts_to_themselves():
    long = [Sample(Prompt(0, "", "", (1, 2)), Response((3,) * n, (-1.0,) * n, False), 1.0) for n in (300, 300, 100)]
    sizes = [len(b) for b in blocks(long, share_prompts=True)]
    assert sizes == [1, 2]  # 302 + 300 is beyond MAX_BLOCK_TOKENS = 512, 302 + 100 is not


def random_groups(rng: random.Random, P: int, G: int) -> tuple[list[Group], torch.Tensor]:
    """Every sequence is unique; its advantage too."""
    ids = iter(range(100, 100_000))

    def draw(longest: int) -> tuple[int, ...]:
        return tuple(next(ids) for _ in range(rng.randint(1, longest)))

    groups = [group(p, draw(6), *(draw(rng.choice([2, 20])) for _ in range(G))) for p in range(P)]
    return groups, torch.arange(P * G, dtype=torch.float32).reshape(P, G)


def over_ranks(groups: list[Group], advantages: torch.Tensor, packing: Packing, **kwargs) -> list[list[GlobalBatch]]:
    """[data rank][optimizer step] of one context rank"""
    return [cut(groups, replace(packing, dp_rank=rank), advantages, **kwargs) for rank in range(packing.dp)]


def sequences(batch: GlobalBatch) -> list[tuple[tuple[int, ...], tuple[int, ...], float]]:
    """(prompt, response, advantage) of every sequence, read back from the packed tensors."""
    out = []
    for m in batch.microbatches:
        for s, (begin, end) in enumerate(pairwise(m.cu_seqlens.tolist())):
            mine = m.sequence_R == s
            ids = tuple(m.token_ids_T[begin:end].tolist())
            first = int(m.position_R[mine][0]) + 1 - begin
            (advantage,) = set(m.advantage_R[mine].tolist())
            assert tuple(m.target_R[mine].tolist()) == ids[first:]
            out.append((ids[:first], ids[first:], advantage))
    return out


@pytest.mark.parametrize("seed", range(10))
def test_every_response_is_packed_once_into_its_optimizer_step_with_its_prompt_and_advantage(seed):
    rng = random.Random(seed)
    P, G, ranks, size = rng.choice([(4, 4, 1, 8), (4, 4, 2, 8), (6, 4, 4, 12), (2, 3, 3, 6), (3, 5, 1, 5)])
    groups, advantages = random_groups(rng, P, G)
    expected = [
        (g.prompt.token_ids, r.token_ids, a)
        for g, row in zip(groups, advantages.tolist(), strict=True)
        for r, a in zip(g.responses, row, strict=True)
    ]
    by_rank = over_ranks(groups, advantages, Packing(max_tokens=60, dp=ranks), global_batch_size=size)
    for step in range(P * G // size):
        share = expected[step * size : (step + 1) * size]
        packed = [s for batches in by_rank for s in sequences(batches[step])]
        assert sorted(packed) == sorted(share)
        assert len({len(batches[step].microbatches) for batches in by_rank}) == 1
        for batches in by_rank:
            # The same on every rank: they are counts of the global batch.
            assert batches[step].num_loss_tokens == sum(len(response) for _, response, _ in share)
            assert batches[step].num_tokens == sum(len(prompt) + len(response) for prompt, response, _ in share)
        for m in (m for batches in by_rank for m in batches[step].microbatches):
            assert torch.equal(m.token_ids_T[m.position_R + 1], m.target_R)
            assert torch.equal(m.rollout_logprobs_R, -m.target_R.float())
            assert m.max_seqlen == m.cu_seqlens.diff().max()


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(
    "max_tokens, cp, align_tokens", [(26, 1, 1), (60, 1, 1), (10_000, 1, 1), (60, 1, 16), (32, 2, 8), (20, 3, 1)]
)
def test_weights_of_all_ranks_and_microbatches_sum_to_the_aggregations_total(
    aggregation, ranks, max_tokens, cp, align_tokens
):
    groups, advantages = random_groups(random.Random(1), 4, 4)
    by_rank = [
        batches
        for cp_rank in range(cp)
        for batches in over_ranks(
            groups,
            advantages,
            Packing(max_tokens, dp=ranks, cp=cp, cp_rank=cp_rank, align_tokens=align_tokens),
            global_batch_size=8,
            aggregation=aggregation,
            max_response_tokens=20,
        )
    ]
    for step in range(2):
        microbatches = [m for batches in by_rank for m in batches[step].microbatches]
        total = sum(m.weight_R.double().sum().item() for m in microbatches)
        tokens = by_rank[0][step].num_loss_tokens
        # constant: tokens / (max_response_tokens 20 x responses 8)
        expected = tokens / (20 * 8) if aggregation == "constant" else 1.0
        assert total == pytest.approx(expected, rel=1.2e-7)  # each weight is rounded to float32 once
        length_of = {t: len(r.token_ids) for g in groups for r in g.responses for t in r.token_ids}
        for m in microbatches:
            own = [length_of[t] for t in m.target_R.tolist()]
            per_token = {
                "token_mean": lambda n: 1 / tokens,
                "sequence_mean": lambda n: 1 / (8 * n),
                "constant": lambda n: 1 / (20 * 8),
            }[aggregation]
            assert m.weight_R.tolist() == pytest.approx([per_token(n) for n in own], rel=1.2e-7)


@pytest.mark.parametrize(
    "aggregation, expected",
    [
        # 3 + 2 + 1 tokens, of which the second response was cut off
        ("token_mean", [1 / 4] * 3 + [0] * 2 + [1 / 4]),
        ("sequence_mean", [1 / 6] * 3 + [0] * 2 + [1 / 2]),  # 1 / (length x 2 responses)
        ("constant", [1 / 12] * 3 + [0] * 2 + [1 / 12]),  # 1 / (4 tokens x 3 responses): a constant
    ],
)
def test_truncated_responses_that_are_skipped_weigh_nothing_and_are_not_counted(aggregation, expected):
    groups = [group(0, (7,), (1, 2, EOS), (1, 3), (EOS,))]
    (b,) = cut(
        groups,
        Packing(max_tokens=20),
        torch.tensor([[1.0, 2.0, 3.0]]),
        aggregation=aggregation,
        max_response_tokens=4,
        skip_truncated=True,
    )
    assert b.microbatches[0].weight_R.tolist() == pytest.approx(expected)
    assert (b.num_loss_tokens, b.num_tokens) == (4, 9)
    assert b.microbatches[0].advantage_R.tolist() == [1.0] * 3 + [2.0] * 2 + [3.0]


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
def test_a_batch_of_nothing_but_skipped_responses_weighs_nothing(aggregation):
    (b,) = cut(
        [group(0, (7,), (1, 2), (1, 3))],
        Packing(max_tokens=20),
        aggregation=aggregation,
        max_response_tokens=4,
        skip_truncated=True,
    )
    assert b.microbatches[0].weight_R.tolist() == [0.0] * 4 and b.num_loss_tokens == 0


def test_averaging_the_microbatches_token_means_is_another_number():
    # Responses of 1 token (loss 1) and 3 tokens (loss 0). Token mean of the global batch: 1 / 4.
    groups, advantages = [group(0, (5,), (1,), (2, 3, 4))], torch.tensor([[1.0, 0.0]])
    right, wrong = [], []
    for max_tokens in (6, 4):  # 2 + 4 tokens: in one microbatch, in two
        (batch,) = cut(groups, Packing(max_tokens), advantages, global_batch_size=2)
        losses = [m.advantage_R for m in batch.microbatches]  # 1, 0, 0, 0
        right.append(sum((m.weight_R * loss).sum().item() for m, loss in zip(batch.microbatches, losses, strict=True)))
        wrong.append(sum(loss.mean().item() for loss in losses) / len(losses))
    assert right == [0.25, 0.25]
    assert wrong == [0.25, 0.5]  # in two microbatches (1 / 1 + 0 / 3) / 2


@pytest.mark.parametrize("share_prompts", [False, True])
def test_context_ranks_together_hold_what_one_rank_would(share_prompts):
    for seed in range(40):
        rng = random.Random(seed)
        cp = 1 if share_prompts else rng.randint(2, 4)
        packing = Packing(max_tokens=240 // cp, cp=cp, align_tokens=rng.choice([1, 4, 6]), share_prompts=share_prompts)
        groups, _ = random_groups(rng, P=2, G=3)
        samples = [Sample(g.prompt, r, rng.random()) for g in groups for r in g.responses]
        weights = [rng.random() for _ in samples]
        plain = microbatch(samples, weights, Packing(max_tokens=240, share_prompts=share_prompts))
        parts = [microbatch(samples, weights, replace(packing, cp_rank=rank)) for rank in range(cp)]

        def merged(values):
            return context.merge([(m.index_R, values(m)) for m in parts])

        for name in ("target_R", "sequence_R", "advantage_R", "weight_R", "rollout_logprobs_R"):
            assert torch.equal(merged(lambda m: getattr(m, name)), getattr(plain, name)), name
        # The hidden state that predicts a token is that of the same token at the same place of its sequence.
        for name in ("token_ids_T", "position_ids_T", "branch_T"):
            assert torch.equal(
                merged(lambda m: getattr(m, name)[m.position_R]), getattr(plain, name)[plain.position_R]
            ), name
        tokens = sorted(t for m in parts for t in m.token_ids_T.tolist())
        padding = len(tokens) - plain.token_ids_T.numel()
        assert tokens == [0] * padding + sorted(plain.token_ids_T.tolist())
        assert len({m.token_ids_T.numel() for m in parts}) == 1 and len(tokens) // cp % packing.align_tokens == 0


def test_pack_keeps_its_promises_for_any_lengths():
    for seed in range(400):
        rng = random.Random(seed)
        dp, cp, multiple = rng.randint(1, 6), rng.choice([1, 1, 2, 3]), rng.choice([1, 1, 2])
        num_sequences = dp * multiple * rng.randint(1, 12)
        if rng.random() < 0.2:
            multiple = num_sequences // dp  # one sequence a microbatch
        packing = Packing(
            rng.randint(24, 200),
            dp=dp,
            cp=cp,
            align_tokens=rng.choice([1, 1, 8]),
            microbatch_multiple=multiple,
            cost=Cost(0.0, rng.choice([0.0, 0.01, 1.0])),
        )
        block, whole = (2 * cp if cp > 1 else 1), math.lcm(cp * packing.align_tokens, 2 * cp if cp > 1 else 1)
        longest = cp * packing.max_tokens // whole * whole
        longest = rng.choice([longest, max(1, longest // 8)])
        lengths = [rng.randint(1, longest) for _ in range(num_sequences)]
        costs = [packing.cost.of(n, 0) for n in lengths]
        plan = pack(lengths, costs, packing)
        case = f"seed {seed}: pack({lengths}, {packing})"
        assert sorted(i for bins in plan for b in bins for i in b) == list(range(len(lengths))), case
        assert len(plan) == dp and len({len(bins) for bins in plan}) == 1, (
            f"{case}: ranks with unequal numbers of microbatches wait for each other for ever"
        )
        assert len(plan[0]) % multiple == 0, case
        assert all(b for bins in plan for b in bins), case
        for b in (b for bins in plan for b in bins):
            padded = sum(-(-lengths[i] // block) * block for i in b)
            assert -(-padded // whole) * whole <= cp * packing.max_tokens, case
        assert pack(list(lengths), list(costs), packing) == plan, case


def test_what_pack_bounds_is_what_microbatch_makes():
    for seed in range(60):
        rng = random.Random(seed)
        dp, cp = rng.randint(1, 2), rng.randint(1, 3)
        packing = Packing(36, dp=dp, cp=cp, align_tokens=rng.choice([1, 5, 6]), cost=Cost(0.2, 0.1))
        groups, advantages = random_groups(rng, P=4, G=4)
        ranks = [replace(packing, dp_rank=i, cp_rank=j) for i in range(dp) for j in range(cp)]
        built = [cut(groups, p, advantages, global_batch_size=16)[0] for p in ranks]
        assert len({(len(b.microbatches), b.packed_frac, b.imbalance) for b in built}) == 1
        assert all(
            m.token_ids_T.numel() <= 36 and m.token_ids_T.numel() % packing.align_tokens == 0
            for b in built
            for m in b.microbatches
        )
        targets = sorted(t for b in built for m in b.microbatches for t in m.target_R.tolist())
        assert targets == sorted(t for g in groups for r in g.responses for t in r.token_ids)


def plan_of(lengths: list[int], packing: Packing) -> list[list[list[int]]]:
    return pack(lengths, [packing.cost.of(n, 0) for n in lengths], packing)


def test_pack_balances_over_ranks_and_microbatches():
    # 11 tokens each. Dealt in the order given, shortest rank first, it would be 1 + 1 and 10 + 10.
    assert plan_of([1, 10, 1, 10], Packing(100, dp=2)) == [[[0, 1]], [[2, 3]]]
    # 24 tokens into microbatches of at most 13: two of 12, not 13 and 11
    lengths = [1, 2, 4, 5, 6, 6]
    assert [sum(lengths[i] for i in b) for b in plan_of(lengths, Packing(13))[0]] == [12, 12]


def test_ranks_of_equal_cost_have_less_to_wait_for_than_ranks_of_equal_tokens():
    lengths = [100] + [10] * 30
    cost = Cost(quadratic=0.01)  # 100 + 0.01 * 100**2 = 200, and 10 + 0.01 * 10**2 = 11: 200 + 30 * 11 = 530 of all

    def of_ranks(plan):
        return sorted(sum(cost.of(lengths[i], 0) for b in bins for i in b) for bins in plan)

    by_tokens = pack(lengths, [float(n) for n in lengths], Packing(400, dp=2))
    assert of_ranks(by_tokens) == [220, 310]  # 20 short ones; the long one and 10: 200 tokens each
    assert of_ranks(plan_of(lengths, Packing(400, dp=2, cost=cost))) == [264, 266]  # 24 short ones; the long one and 6


def test_microbatches_of_a_rank_are_balanced_by_cost_within_the_bound():
    # As above on one rank, in two microbatches: 266 and 264. With at most 210 tokens, 24 short ones are too many: 21
    # fit, and the other 9 stand beside the long one.
    lengths, cost = [100] + [10] * 30, Cost(quadratic=0.01)
    assert [len(b) for b in plan_of(lengths, Packing(240, cost=cost))[0]] == [7, 24]
    assert [len(b) for b in plan_of(lengths, Packing(210, cost=cost))[0]] == [10, 21]


def test_a_cost_counts_tokens_response_tokens_and_pairs_of_tokens():
    assert Cost().of(10, 4) == 10
    assert Cost(head=0.5, quadratic=0.25).of(10, 4) == 10 + 2 + 25


def test_pack_makes_no_more_microbatches_than_tokens_ask_for():
    assert plan_of([3, 4, 5], Packing(12)) == [[[0, 1, 2]]]
    assert plan_of([5, 5], Packing(9)) == [[[0], [1]]]
    # cp = 2: 3 tokens are padded to 4, and two ranks of 6 hold three of them,
    assert plan_of([3, 3, 3], Packing(6, cp=2)) == [[[0, 1, 2]]]
    # but not if each rank's tokens are a multiple of 4: then 4 and 4 are the most, two of them
    assert plan_of([3, 3, 3], Packing(6, cp=2, align_tokens=4)) == [[[0, 2], [1]]]


def test_a_rank_whose_one_sequence_is_dear_still_fills_as_many_microbatches_as_the_others():
    # Costs 40 + 40**2 and 8 of 10 + 10**2 = 110: by cost alone 40 tokens stand against 80, which need two microbatches
    # of 40.
    plan = plan_of([40] + [10] * 8, Packing(40, dp=2, cost=Cost(quadratic=1.0)))
    assert [[len(b) for b in bins] for bins in plan] == [[1, 1], [4, 3]]
    # 30 against 4 * 12: 78 tokens would do with one microbatch of 40 on each rank, but 48 ask for two, and so for
    # another share.
    plan = plan_of([30] + [12] * 4, Packing(40, dp=2, cost=Cost(quadratic=1.0)))
    assert [[len(b) for b in bins] for bins in plan] == [[1, 1], [2, 1]]


def test_the_number_of_microbatches_is_a_multiple_of_what_interleaved_stages_ask_for():
    assert [len(b) for b in plan_of([5] * 4, Packing(10, microbatch_multiple=1))[0]] == [2, 2]
    assert [len(b) for b in plan_of([5] * 4, Packing(10, microbatch_multiple=4))[0]] == [1, 1, 1, 1]
    # 30 tokens would do with 2.
    assert [len(b) for b in plan_of([5] * 6, Packing(25, microbatch_multiple=3))[0]] == [2, 2, 2]


def test_where_every_microbatch_holds_one_sequence_ranks_are_balanced_still():
    lengths = [1, 2, 3, 4, 5, 6]
    plan = plan_of(lengths, Packing(100, dp=2, microbatch_multiple=3))
    assert [len(b) for bins in plan for b in bins] == [1] * 6
    assert [sum(lengths[i] for b in bins for i in b) for bins in plan] == [11, 10]  # 6 + 3 + 2 and 5 + 4 + 1


@pytest.mark.parametrize(
    "lengths, packing, message",
    [
        ([3, 11, 4], Packing(10), "a sequence of 11 tokens does not fit max_tokens_per_microbatch = 10"),
        (
            [21, 4],
            Packing(10, cp=2),
            "a sequence of 21 tokens does not fit max_tokens_per_microbatch = 10 on 2 context ranks",
        ),
        # 2 * 10 tokens, but whole 16s of them
        ([17], Packing(10, cp=2, align_tokens=8), "multiple of 16, at most 16 do"),
        ([1, 1, 1], Packing(10, dp=4), "3 sequences do not make equal numbers of microbatches on 4 data ranks"),
        ([1, 1, 1], Packing(10, dp=2, microbatch_multiple=2), "3 sequences .* 2 data ranks, a multiple of 2 on each"),
        (
            [6, 6, 6],
            Packing(10, microbatch_multiple=2),
            "no plan found for 3 sequences on 1 data ranks in microbatches of at most 10 tokens",
        ),
    ],
)
def test_pack_names_what_does_not_fit(lengths, packing, message):
    with pytest.raises(ValueError, match=message):
        plan_of(lengths, packing)


def test_shared_prompts_and_context_parallelism_exclude_each_other():
    with pytest.raises(ValueError, match="share_prompts with cp = 2"):
        Packing(10, cp=2, share_prompts=True)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("max_tokens, cp, room", [(9, 1, 18), (5, 2, 20)])
def test_packed_frac_and_imbalance_of_a_worked_example(rank, max_tokens, cp, room):
    # 1 + 3 and 1 + 1 tokens cost 4 + 3 + 0.5 * 16 = 15 and 2 + 1 + 0.5 * 4 = 5: the dearest is 15 of a mean of 10.
    # One microbatch on each of two data ranks: 6 of 2 * 9 or of 2 * 2 * 5 tokens, however many of the rest are padding.
    (b,) = cut(
        [group(0, (5,), (1, 2, 3), (4,))],
        Packing(max_tokens, dp=2, dp_rank=rank, cp=cp, align_tokens=2, cost=Cost(head=1.0, quadratic=0.5)),
    )
    assert b.packed_frac == 6 / room
    assert b.imbalance == 15 / 10 - 1
    (b,) = cut([group(0, (5,), (1, 2, 3), (4,))], Packing(max_tokens, cp=cp, microbatch_multiple=2))
    assert b.packed_frac == 6 / room and b.imbalance == 0.0  # two microbatches on one rank


def test_shared_packing_cuts_where_cost_is_halved_and_counts_a_shared_prompt_once():
    # Prompts of 2 tokens. Tokens and costs n + 0.5 * n**2 so far: 2+3 = 5: 17.5, 2+3+1 = 6: 24 | 2+1 = 3: 24 + 7.5,
    # 2+1+1 = 4: 24 + 12 = 36.
    # Half of it, 18, is nearest to 17.5: the first sample stands alone, the second has its prompt again.
    # Ranks: 17.5 and 7.5 + 12 = 19.5, of a mean of 18.5; 5 and 3 + 4 tokens of 2 * 8. Halves by number would be 24 and
    # 12.
    groups = [group(0, (7, 10), (1, 2, 3), (4,)), group(1, (8, 11), (5,), (6,))]
    packing = Packing(8, dp=2, share_prompts=True, cost=Cost(quadratic=0.5))
    (b0,), (b1,) = over_ranks(groups, torch.zeros(2, 2), packing, global_batch_size=4)
    assert [m.token_ids_T.tolist() for m in b0.microbatches] == [[7, 10, 1, 2, 3]]
    assert [m.token_ids_T.tolist() for m in b1.microbatches] == [[7, 10, 4, 8, 11, 5, 6]]
    for b in (b0, b1):
        assert b.packed_frac == 12 / 16
        assert b.imbalance == 19.5 / 18.5 - 1


def test_cuts_in_order_balance_cost_and_leave_no_part_empty():
    def cut(lengths: list[int], packing: Packing) -> list[list[list[int]]]:
        return pack_in_order(
            [s for i, n in enumerate(lengths) for s in samples_of((1,) * (n - 1), prompt=(i,))], packing
        )

    lengths, packing = [10, 3, 3, 3, 3, 3], Packing(100, dp=2, share_prompts=True)
    # 25 tokens, half of them nearest to 10 + 3; n + 0.5 * n**2: 60 + 5 * 7.5 = 97.5, half of it nearest to 60
    assert cut(lengths, packing) == [[[0, 1]], [[2, 3, 4, 5]]]
    assert cut(lengths, replace(packing, cost=Cost(quadratic=0.5))) == [[[0]], [[1, 2, 3, 4, 5]]]
    # Every quarter of the whole falls within the long one.
    for lengths in ([30, 2, 2, 2], [2, 2, 2, 30]):
        assert cut(lengths, replace(packing, dp=4)) == [[[0]], [[1]], [[2]], [[3]]]


GROUPS = [group(0, (5,), (1,), (2, 3)), group(1, (6,), (4,), (7, 8))]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(global_batch_size=3), "4 samples, global_batch_size 3"),
        (dict(global_batch_size=2, packing=Packing(10, dp=4)), "global_batch_size 2, 4 data ranks"),
        (dict(advantages=torch.zeros(1, 2)), "zip"),  # a group without advantages
        (dict(advantages=torch.zeros(3, 2)), "zip"),
        (dict(advantages=torch.zeros(2, 3)), "zip"),  # an advantage without a response
        (dict(packing=Packing(2)), "a sequence of 3 tokens does not fit"),
        (dict(packing=Packing(2, share_prompts=True)), "a sequence of 3 tokens does not fit"),
    ],
)
def test_assemble_refuses_what_does_not_fit_together(change, message):
    fits = dict(
        advantages=torch.zeros(2, 2),
        global_batch_size=2,
        aggregation="token_mean",
        max_response_tokens=2,
        packing=Packing(10),
    )
    assemble(GROUPS, fits["advantages"], **{k: v for k, v in fits.items() if k != "advantages"})
    arguments = {**fits, **change}
    with pytest.raises(ValueError, match=message):
        assemble(GROUPS, arguments.pop("advantages"), **arguments)


def test_a_response_without_a_log_prob_for_each_token_is_refused():
    short = Sample(Prompt(0, "", "", (5,)), Response((1, 2, 3), (-1.0, -1.0), False), 1.0)
    with pytest.raises(ValueError, match="has 3 sampled tokens, but 2 rollout log-probs"):
        microbatch([short], [1.0])


def test_log_probs_are_matched_with_tokens_response_by_response():
    lacks, exceeds = (
        Sample(Prompt(0, "", "", (5,)), Response(ids, logprobs, False), 1.0)
        for ids, logprobs in (((1, 2), (-1.0,)), ((3,), (-3.0, -3.5)))
    )
    with pytest.raises(ValueError, match="rollout log-probs"):
        microbatch([lacks, exceeds], [1.0, 1.0])


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
@pytest.mark.parametrize(
    "packing", [Packing(60), Packing(60, share_prompts=True), Packing(60, dp=2), Packing(40, cp=2, cp_rank=1)], ids=str
)
def test_a_masked_prompt_takes_its_place_in_the_batch_and_counts_nothing(aggregation, packing):
    groups, advantages = random_groups(random.Random(4), 4, 4)
    kwargs = dict(aggregation=aggregation, max_response_tokens=20)
    masked = [replace(g, prompt=replace(g.prompt, masked=i == 1)) for i, g in enumerate(groups)]
    seen = over_ranks(masked, advantages, packing, global_batch_size=8, **kwargs)
    # The first optimizer step is left with group 0, the second has groups 2 and 3 as ever: nothing moves up.
    alone = over_ranks(groups[:1], advantages[:1], packing, global_batch_size=4, **kwargs)
    later = over_ranks(groups[2:], advantages[2:], packing, global_batch_size=8, **kwargs)

    def of(batches: list[list[GlobalBatch]], step: int) -> list[tuple]:
        return sorted(
            row
            for rank in batches
            for m in rank[step].microbatches
            for row in zip(
                m.target_R.tolist(),
                m.weight_R.tolist(),
                m.advantage_R.tolist(),
                m.rollout_logprobs_R.tolist(),
                strict=True,
            )
        )

    assert len(seen[0]) == 2
    if packing.cp == 1:  # which tokens a context rank has depends on the packing
        assert of(seen, 0) == of(alone, 0) and of(seen, 1) == of(later, 0)
    assert seen[0][0].num_loss_tokens == alone[0][0].num_loss_tokens
    # they are computed
    assert seen[0][0].num_tokens == sum(
        len(g.prompt.token_ids) * 4 + sum(len(r.token_ids) for r in g.responses) for g in groups[:2]
    )
    for m in (m for rank in seen for b in rank for m in b.microbatches):
        rows = [x for f, x in vars(m).items() if f.endswith("_R") and x is not None]
        assert len({len(x) for x in rows}) == 1
    (nothing,) = over_ranks(masked[1:2], advantages[1:2], packing, global_batch_size=4, **kwargs)[0]
    assert nothing.num_loss_tokens == 0 and all(
        m.target_R.numel() == 0 and m.target_R.dtype == torch.int64 for m in nothing.microbatches
    )
