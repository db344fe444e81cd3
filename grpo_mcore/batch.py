"""Groups and advantages to packed, balanced microbatches; owner of the loss mask and of the ONE loss denominator.

Every rank sees all groups and plans the same way, so no collective is needed: a rank takes its part of the plan.
The denominator is a property of the global batch; every token's weight already carries it:

    token_mean      1 / (response tokens of the global batch)                        DAPO
    sequence_mean   1 / (own length x responses of the global batch)                 GRPO, arXiv 2402.03300
    constant        1 / (max_response_tokens x responses of the global batch)        Dr. GRPO

so that loss = sum over tokens of weight * loss, whatever the packing, the microbatch size and the ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from grpo_mcore.types import GlobalBatch, Group, Microbatch, Prompt, Response

# Attention within a block grows with the square of its length, so long responses keep their prompts to themselves.
MAX_BLOCK_TOKENS = 512


@dataclass(frozen=True)
class Sample:
    """One sequence to learn from."""

    prompt: Prompt
    response: Response
    advantage: float

    @property
    def num_tokens(self) -> int:
        return len(self.prompt.token_ids) + len(self.response.token_ids)


def assemble(
    groups: Sequence[Group],
    advantages_PG: torch.Tensor,
    *,
    global_batch_size: int,
    max_tokens: int,
    aggregation: str,
    max_response_tokens: int,
    shard: tuple[int, int] = (0, 1),
    share_prompts: bool = False,
) -> list[GlobalBatch]:
    """One GlobalBatch per optimizer step: consecutive samples, in the order of the groups.

    `shard` is (dp_rank, dp). With `share_prompts`, siblings of one microbatch stand behind one copy of their prompt. Raises ValueError if global_batch_size does not divide the samples, or dp it.
    """
    samples = [
        Sample(group.prompt, response, advantage)
        for group, row in zip(groups, advantages_PG.tolist(), strict=True)
        for response, advantage in zip(group.responses, row, strict=True)
    ]
    rank, ranks = shard
    if len(samples) % global_batch_size or global_batch_size % ranks:
        raise ValueError(f"{len(samples)} samples, global_batch_size {global_batch_size}, {ranks} data ranks: each must divide the one before")
    return [
        _global_batch(samples[i : i + global_batch_size], shard, max_tokens, aggregation, max_response_tokens, share_prompts)
        for i in range(0, len(samples), global_batch_size)
    ]


def _global_batch(samples, shard, max_tokens, aggregation, max_response_tokens, share_prompts) -> GlobalBatch:
    rank, ranks = shard
    num_loss_tokens = sum(len(s.response.token_ids) for s in samples)

    def weight(s: Sample) -> float:
        if aggregation == "token_mean":
            return 1.0 / num_loss_tokens
        if aggregation == "sequence_mean":
            return 1.0 / (len(s.response.token_ids) * len(samples))
        return 1.0 / (max_response_tokens * len(samples))

    plan = pack_in_order(samples, ranks, max_tokens) if share_prompts else pack([s.num_tokens for s in samples], ranks, max_tokens)
    return GlobalBatch(
        microbatches=[microbatch([samples[i] for i in b], [weight(samples[i]) for i in b], share_prompts=share_prompts) for b in plan[rank]],
        num_loss_tokens=num_loss_tokens,
        num_tokens=sum(s.num_tokens for s in samples),
    )


def pack(lengths: Sequence[int], ranks: int, max_tokens: int) -> list[list[list[int]]]:
    """[rank][microbatch][index into lengths]: equal counts of sequences per rank, equal counts of microbatches per
    rank, none empty, none above max_tokens, tokens balanced over both. Deterministic.

    Raises ValueError if one sequence alone is longer than max_tokens.
    """
    if max(lengths) > max_tokens:
        raise ValueError(f"a sequence of {max(lengths)} tokens does not fit max_tokens_per_microbatch = {max_tokens}")
    per_rank = _spread(range(len(lengths)), lengths, ranks, max_items=len(lengths) // ranks)
    num_bins = max(-(-sum(lengths[i] for i in part) // max_tokens) for part in per_rank)
    while True:
        plan = [_spread(part, lengths, num_bins) for part in per_rank]
        if all(sum(lengths[i] for i in b) <= max_tokens for bins in plan for b in bins):
            return plan
        num_bins += 1  # ends at the latest with one sequence per microbatch


def _spread(indices, lengths: Sequence[int], num_bins: int, max_items: int | None = None) -> list[list[int]]:
    """Longest first, each to the lightest bin that has room; indices ascending within a bin."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads = [0] * num_bins
    for i in sorted(indices, key=lambda i: (-lengths[i], i)):
        b = min((b for b in range(num_bins) if max_items is None or len(bins[b]) < max_items), key=lambda b: (loads[b], b))
        bins[b].append(i)
        loads[b] += lengths[i]
    return [sorted(b) for b in bins]


def pack_in_order(samples: Sequence[Sample], ranks: int, max_tokens: int) -> list[list[list[int]]]:
    """Like `pack`, but consecutive samples stay together, so that siblings can share their prompt; balanced by their number.

    Raises ValueError if one sequence alone is longer than max_tokens.
    """
    n = len(samples) // ranks
    for num_bins in range(1, n + 1):
        plan = [[list(range(r * n + n * b // num_bins, r * n + n * (b + 1) // num_bins)) for b in range(num_bins)] for r in range(ranks)]
        if all(_num_shared_tokens([samples[i] for i in b]) <= max_tokens for bins in plan for b in bins):
            return plan
    raise ValueError(f"a sequence of {max(s.num_tokens for s in samples)} tokens does not fit max_tokens_per_microbatch = {max_tokens}")


def blocks(samples: Sequence[Sample], *, share_prompts: bool) -> list[list[Sample]]:
    """Consecutive samples that stand behind one copy of their prompt."""
    out: list[list[Sample]] = []
    size = 0
    for s in samples:
        size += len(s.response.token_ids)
        if share_prompts and out and out[-1][0].prompt == s.prompt and size <= MAX_BLOCK_TOKENS:
            out[-1].append(s)
        else:
            out.append([s])
            size = s.num_tokens
    return out


def _num_shared_tokens(samples: Sequence[Sample]) -> int:
    return sum(len(b[0].prompt.token_ids) + sum(len(s.response.token_ids) for s in b) for b in blocks(samples, share_prompts=True))


def microbatch(samples: Sequence[Sample], weights: Sequence[float], *, share_prompts: bool = False) -> Microbatch:
    """Packs whole sequences one behind the other."""
    token_ids, position_ids, branches, cu_seqlens, positions = [], [], [], [], []
    targets, sequences, advantages, weight_R, rollout_logprobs = [], [], [], [], []
    for block in blocks(samples, share_prompts=share_prompts):
        prompt = block[0].prompt.token_ids
        cu_seqlens.append(len(token_ids))
        token_ids += prompt
        position_ids += range(len(prompt))
        branches += [0] * len(prompt)
        last_of_prompt = len(token_ids) - 1
        for branch, s in enumerate(block, 1):
            response = s.response.token_ids
            positions += [last_of_prompt, *range(len(token_ids), len(token_ids) + len(response) - 1)]
            token_ids += response
            position_ids += range(len(prompt), len(prompt) + len(response))
            branches += [branch] * len(response)
    for index, (s, weight) in enumerate(zip(samples, weights, strict=True)):
        length = len(s.response.token_ids)
        if len(s.response.rollout_logprobs) != length:
            raise ValueError(f"a response to prompt {s.prompt.id} has {length} tokens, but {len(s.response.rollout_logprobs)} rollout log-probs")
        targets += s.response.token_ids
        sequences += [index] * length
        advantages += [s.advantage] * length
        weight_R += [weight] * length
        rollout_logprobs += s.response.rollout_logprobs
    return Microbatch(
        token_ids_T=torch.tensor(token_ids),
        position_ids_T=torch.tensor(position_ids),
        branch_T=torch.tensor(branches),
        cu_seqlens=torch.tensor([*cu_seqlens, len(token_ids)], dtype=torch.int32),
        max_seqlen=max(s.num_tokens for s in samples),
        position_R=torch.tensor(positions),
        target_R=torch.tensor(targets),
        sequence_R=torch.tensor(sequences),
        advantage_R=torch.tensor(advantages, dtype=torch.float32),
        weight_R=torch.tensor(weight_R, dtype=torch.float32),
        rollout_logprobs_R=torch.tensor(rollout_logprobs, dtype=torch.float32),
    )
