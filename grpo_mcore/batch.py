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
) -> list[GlobalBatch]:
    """One GlobalBatch per optimizer step: consecutive samples, in the order of the groups.

    `shard` is (dp_rank, dp). Raises ValueError if global_batch_size does not divide the samples, or dp it.
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
        _global_batch(samples[i : i + global_batch_size], rank, ranks, max_tokens, aggregation, max_response_tokens)
        for i in range(0, len(samples), global_batch_size)
    ]


def _global_batch(samples, rank, ranks, max_tokens, aggregation, max_response_tokens) -> GlobalBatch:
    num_loss_tokens = sum(len(s.response.token_ids) for s in samples)

    def weight(s: Sample) -> float:
        if aggregation == "token_mean":
            return 1.0 / num_loss_tokens
        if aggregation == "sequence_mean":
            return 1.0 / (len(s.response.token_ids) * len(samples))
        return 1.0 / (max_response_tokens * len(samples))

    bins = pack([s.num_tokens for s in samples], ranks, max_tokens)[rank]
    return GlobalBatch(
        microbatches=[microbatch([samples[i] for i in indices], [weight(samples[i]) for i in indices]) for indices in bins],
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


def microbatch(samples: Sequence[Sample], weights: Sequence[float]) -> Microbatch:
    """Packs whole sequences one behind the other."""
    token_ids, position_ids, cu_seqlens = [], [], [0]
    positions, targets, sequences, advantages, weight_R, rollout_logprobs = [], [], [], [], [], []
    for index, (s, weight) in enumerate(zip(samples, weights, strict=True)):
        if len(s.response.rollout_logprobs) != len(s.response.token_ids):
            raise ValueError(f"a response to prompt {s.prompt.id} has {len(s.response.token_ids)} tokens, but {len(s.response.rollout_logprobs)} rollout log-probs")
        start, prompt_len, response_len = cu_seqlens[-1], len(s.prompt.token_ids), len(s.response.token_ids)
        token_ids += s.prompt.token_ids + s.response.token_ids
        position_ids += range(prompt_len + response_len)
        positions += range(start + prompt_len - 1, start + prompt_len + response_len - 1)
        targets += s.response.token_ids
        sequences += [index] * response_len
        advantages += [s.advantage] * response_len
        weight_R += [weight] * response_len
        rollout_logprobs += s.response.rollout_logprobs
        cu_seqlens.append(start + prompt_len + response_len)
    return Microbatch(
        token_ids_T=torch.tensor(token_ids),
        position_ids_T=torch.tensor(position_ids),
        cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32),
        max_seqlen=max(s.num_tokens for s in samples),
        position_R=torch.tensor(positions),
        target_R=torch.tensor(targets),
        sequence_R=torch.tensor(sequences),
        advantage_R=torch.tensor(advantages, dtype=torch.float32),
        weight_R=torch.tensor(weight_R, dtype=torch.float32),
        rollout_logprobs_R=torch.tensor(rollout_logprobs, dtype=torch.float32),
    )
