"""Groups to packed microbatches: the example of types.py, the rules of the packing, and the ONE loss denominator.

Not covered here: that Megatron's gradient keeps to these weights (test_policy.py).
"""

import random

import pytest
import torch

from grpo_mcore.batch import Sample, assemble, blocks, microbatch, pack
from grpo_mcore.types import GlobalBatch, Group, Prompt, Response

EOS = 99


def group(prompt_id: int, prompt: tuple[int, ...], *responses: tuple[int, ...]) -> Group:
    """Its tokens' rollout log-probs are minus the tokens, so that a mix-up shows."""
    return Group(
        Prompt(prompt_id, "", "", prompt),
        tuple(Response(r, tuple(-float(t) for t in r), truncated=r[-1] != EOS, policy_version=0) for r in responses))


def test_the_worked_example_of_types():
    seven, plus, five, equals = 7, 10, 5, 11
    prompt = (seven, plus, five, equals)
    (batch,) = assemble(
        [group(0, prompt, (1, 2, EOS), (1, 3))], torch.tensor([[0.5, -0.5]]),
        global_batch_size=2, max_tokens=13, aggregation="token_mean", max_response_tokens=4)
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
    assert m.old_logprobs_R is None and m.ref_logprobs_R is None
    assert (batch.num_loss_tokens, batch.num_tokens) == (5, 13)
    dtypes = {name: getattr(m, name).dtype for name in ("token_ids_T", "position_ids_T", "position_R", "target_R", "sequence_R", "cu_seqlens")}
    assert dtypes.pop("cu_seqlens") == torch.int32  # what flash attention demands
    assert set(dtypes.values()) == {torch.int64}


def test_the_worked_example_with_a_shared_prompt():
    prompt = (7, 10, 5, 11)
    (batch,) = assemble(
        [group(0, prompt, (1, 2, EOS), (1, 3))], torch.tensor([[0.5, -0.5]]),
        global_batch_size=2, max_tokens=9, aggregation="token_mean", max_response_tokens=4, share_prompts=True)
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


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_shared_packing_keeps_every_sample_once_within_the_bound_and_order(ranks):
    rng = random.Random(ranks)
    for _ in range(20):
        groups, advantages = random_groups(rng, P=8, G=4)
        seen, counts = [], set()
        for rank in range(ranks):
            (batch,) = assemble(
                groups, advantages, global_batch_size=32, max_tokens=60, aggregation="token_mean", max_response_tokens=20,
                shard=(rank, ranks), share_prompts=True)
            counts.add(len(batch.microbatches))
            for m in batch.microbatches:
                assert 0 < m.token_ids_T.numel() <= 60
                seen += m.target_R.tolist()
        assert len(counts) == 1
        assert seen == [t for g in groups for r in g.responses for t in r.token_ids]


def test_long_responses_keep_their_prompts_to_themselves():
    long = [Sample(Prompt(0, "", "", (1, 2)), Response((3,) * n, (-1.0,) * n, False, 0), 1.0) for n in (300, 300, 100)]
    sizes = [len(b) for b in blocks(long, share_prompts=True)]
    assert sizes == [1, 2]  # 302 + 300 is beyond MAX_BLOCK_TOKENS = 512, 302 + 100 is not


def random_groups(rng: random.Random, P: int, G: int) -> tuple[list[Group], torch.Tensor]:
    """Every sequence is unique; its advantage too."""
    ids = iter(range(100, 100_000))

    def draw(longest: int) -> tuple[int, ...]:
        return tuple(next(ids) for _ in range(rng.randint(1, longest)))

    groups = [group(p, draw(6), *(draw(rng.choice([2, 20])) for _ in range(G))) for p in range(P)]
    return groups, torch.arange(P * G, dtype=torch.float32).reshape(P, G)


def over_ranks(groups: list[Group], advantages: torch.Tensor, ranks: int, **kwargs) -> list[list[GlobalBatch]]:
    """[rank][optimizer step]"""
    return [assemble(groups, advantages, shard=(rank, ranks), **kwargs) for rank in range(ranks)]


def sequences(batch: GlobalBatch) -> list[tuple[tuple[int, ...], tuple[int, ...], float]]:
    """(prompt, response, advantage) of every sequence, read back from the packed tensors."""
    out = []
    for m in batch.microbatches:
        bounds = m.cu_seqlens.tolist()
        for s, (begin, end) in enumerate(zip(bounds, bounds[1:])):
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
    expected = [(g.prompt.token_ids, r.token_ids, a) for g, row in zip(groups, advantages.tolist()) for r, a in zip(g.responses, row)]
    by_rank = over_ranks(groups, advantages, ranks, global_batch_size=size, max_tokens=60, aggregation="token_mean", max_response_tokens=20)
    for step in range(P * G // size):
        share = expected[step * size : (step + 1) * size]
        packed = [s for batches in by_rank for s in sequences(batches[step])]
        assert sorted(packed) == sorted(share)
        for batches in by_rank:
            assert len(sequences(batches[step])) == size // ranks
            # The same on every rank: they are counts of the global batch.
            assert batches[step].num_loss_tokens == sum(len(response) for _, response, _ in share)
            assert batches[step].num_tokens == sum(len(prompt) + len(response) for prompt, response, _ in share)
        for m in (m for batches in by_rank for m in batches[step].microbatches):
            assert torch.equal(m.token_ids_T[m.position_R + 1], m.target_R)
            assert torch.equal(m.rollout_logprobs_R, -m.target_R.float())
            assert m.max_seqlen == m.cu_seqlens.diff().max()


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("max_tokens", [26, 60, 10_000])
def test_weights_of_all_ranks_and_microbatches_sum_to_the_aggregations_total(aggregation, ranks, max_tokens):
    groups, advantages = random_groups(random.Random(1), 4, 4)
    by_rank = over_ranks(groups, advantages, ranks, global_batch_size=8, max_tokens=max_tokens, aggregation=aggregation, max_response_tokens=20)
    for step in range(2):
        microbatches = [m for batches in by_rank for m in batches[step].microbatches]
        total = sum(m.weight_R.double().sum().item() for m in microbatches)
        tokens = by_rank[0][step].num_loss_tokens
        # constant: tokens / (max_response_tokens 20 x responses 8)
        expected = tokens / (20 * 8) if aggregation == "constant" else 1.0
        assert total == pytest.approx(expected, rel=1.2e-7)  # each weight is rounded to float32 once
        for m in microbatches:
            for s in range(len(m.cu_seqlens) - 1):
                own = m.weight_R[m.sequence_R == s].double()
                per_token = {"token_mean": 1 / tokens, "sequence_mean": 1 / (8 * len(own)), "constant": 1 / (20 * 8)}[aggregation]
                assert own.tolist() == pytest.approx([per_token] * len(own), rel=1.2e-7)


def test_averaging_the_microbatches_token_means_is_another_number():
    # Responses of 1 token (loss 1) and 3 tokens (loss 0). Token mean of the global batch: 1 / 4.
    groups, advantages = [group(0, (5,), (1,), (2, 3, 4))], torch.tensor([[1.0, 0.0]])
    right, wrong = [], []
    for max_tokens in (6, 4):  # 2 + 4 tokens: in one microbatch, in two
        (batch,) = assemble(groups, advantages, global_batch_size=2, max_tokens=max_tokens, aggregation="token_mean", max_response_tokens=3)
        losses = [m.advantage_R for m in batch.microbatches]  # 1, 0, 0, 0
        right.append(sum((m.weight_R * loss).sum().item() for m, loss in zip(batch.microbatches, losses, strict=True)))
        wrong.append(sum(loss.mean().item() for loss in losses) / len(losses))
    assert right == [0.25, 0.25]
    assert wrong == [0.25, 0.5]  # in two microbatches (1 / 1 + 0 / 3) / 2


def test_pack_keeps_its_promises_for_any_lengths():
    for seed in range(300):
        rng = random.Random(seed)
        ranks, max_tokens = rng.randint(1, 6), rng.randint(10, 200)
        longest = rng.choice([max_tokens, max(1, max_tokens // 8)])
        lengths = [rng.randint(1, longest) for _ in range(ranks * rng.randint(1, 12))]
        plan = pack(lengths, ranks, max_tokens)
        case = f"seed {seed}: pack({lengths}, {ranks}, {max_tokens})"
        assert sorted(i for bins in plan for b in bins for i in b) == list(range(len(lengths))), case
        assert [sum(map(len, bins)) for bins in plan] == [len(lengths) // ranks] * ranks, case
        assert len({len(bins) for bins in plan}) == 1, f"{case}: ranks with unequal numbers of microbatches wait for each other for ever"
        assert all(b for bins in plan for b in bins), case
        assert max(sum(lengths[i] for i in b) for bins in plan for b in bins) <= max_tokens, case
        assert pack(list(lengths), ranks, max_tokens) == plan, case


def test_pack_balances_tokens_over_ranks_and_microbatches():
    # 11 tokens each. Dealt in the order given, shortest rank first, it would be 1 + 1 and 10 + 10.
    assert pack([1, 10, 1, 10], 2, 100) == [[[0, 1]], [[2, 3]]]
    # 24 tokens into microbatches of at most 13: two of 12, not 13 and 11
    lengths = [1, 2, 4, 5, 6, 6]
    assert [sum(lengths[i] for i in b) for b in pack(lengths, 1, 13)[0]] == [12, 12]


def test_pack_makes_no_more_microbatches_than_tokens_ask_for():
    assert pack([3, 4, 5], 1, 12) == [[[0, 1, 2]]]
    assert pack([5, 5], 1, 9) == [[[0], [1]]]


def test_pack_refuses_a_sequence_longer_than_a_microbatch():
    with pytest.raises(ValueError, match="a sequence of 11 tokens does not fit max_tokens_per_microbatch = 10"):
        pack([3, 11, 4], 1, 10)


GROUPS = [group(0, (5,), (1,), (2, 3)), group(1, (6,), (4,), (7, 8))]


@pytest.mark.parametrize("change, message", [
    (dict(global_batch_size=3), "4 samples, global_batch_size 3"),
    (dict(global_batch_size=2, shard=(0, 4)), "global_batch_size 2, 4 data ranks"),
    (dict(advantages=torch.zeros(1, 2)), "zip"),  # a group without advantages
    (dict(advantages=torch.zeros(3, 2)), "zip"),
    (dict(advantages=torch.zeros(2, 3)), "zip"),  # an advantage without a response
    (dict(max_tokens=2), "a sequence of 3 tokens does not fit"),
])
def test_assemble_refuses_what_does_not_fit_together(change, message):
    fits = dict(advantages=torch.zeros(2, 2), global_batch_size=2, max_tokens=10, aggregation="token_mean", max_response_tokens=2)
    assemble(GROUPS, fits["advantages"], **{k: v for k, v in fits.items() if k != "advantages"})
    arguments = {**fits, **change}
    with pytest.raises(ValueError, match=message):
        assemble(GROUPS, arguments.pop("advantages"), **arguments)


def test_a_response_without_a_log_prob_for_each_token_is_refused():
    short = Sample(Prompt(0, "", "", (5,)), Response((1, 2, 3), (-1.0, -1.0), False, 0), 1.0)
    with pytest.raises(ValueError, match="has 3 tokens, but 2 rollout log-probs"):
        microbatch([short], [1.0])


def test_log_probs_are_matched_with_tokens_response_by_response():
    lacks, exceeds = (Sample(Prompt(0, "", "", (5,)), Response(ids, logprobs, False, 0), 1.0) for ids, logprobs in (((1, 2), (-1.0,)), ((3,), (-3.0, -3.5))))
    with pytest.raises(ValueError, match="rollout log-probs"):
        microbatch([lacks, exceeds], [1.0, 1.0])
