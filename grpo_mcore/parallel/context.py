"""The zigzag split of context parallelism, which Transformer Engine expects of packed sequences (THD).

Each block of n tokens is cut into 2 * size chunks, and rank r holds chunks r and 2 * size - 1 - r: under a causal mask
an early chunk is cheap and a late one dear, so that every rank has as much to do. Attention is given the bounds of
whole blocks, so cu_seqlens and max_seqlen are not split.

T tokens and R response tokens of the whole microbatch; a rank has T / size of the one and any number, even 0, of the
other.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import pairwise

import torch
import torch.nn.functional as F

from grpo_mcore.types import Microbatch


def indices(cu_seqlens: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """int64 [T / size], the place in the whole microbatch of each token of this rank: block by block, the early chunk
    first.

    Raises ValueError if size > 1 and a block's tokens are no multiple of 2 * size.
    """
    if size == 1:
        return torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)
    parts = []
    for start, end in pairwise(cu_seqlens.tolist()):
        chunk, rest = divmod(end - start, 2 * size)
        if rest:
            raise ValueError(f"a block of {end - start} tokens: must be a multiple of 2 * cp = {2 * size}")
        parts += [
            torch.arange(start + k * chunk, start + (k + 1) * chunk, device=cu_seqlens.device)
            for k in (rank, 2 * size - 1 - rank)
        ]
    return torch.cat(parts)


def split(batch: Microbatch, rank: int, size: int) -> Microbatch:
    """This rank's tokens, and the response tokens whose predicting hidden state (position_R) is among them, in the
    order of the whole batch. A target may be another rank's token: it travels in target_R.
    """
    if size == 1:
        return batch
    mine_T = indices(batch.cu_seqlens, rank, size)
    local_T = torch.full_like(batch.token_ids_T, -1)  # -1: on another rank
    local_T[mine_T] = torch.arange(len(mine_T), device=local_T.device)
    position_R = local_T[batch.position_R]
    mine_R = (position_R >= 0).nonzero()[:, 0]
    whole = replace(batch, position_R=position_R)
    mine = {"_T": mine_T, "_R": mine_R}
    per_token = {f.name: getattr(whole, f.name) for f in fields(whole) if f.name[-2:] in mine}
    return replace(whole, **{name: x[mine[name[-2:]]] for name, x in per_token.items() if x is not None})


def merge(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Undoes the split: from (index_R, values_R) of every rank, the values [R] in the order of the whole batch.

    Raises ValueError if an index is missing (before the largest: how many there should be, it cannot know) or comes
    twice.
    """
    index_R, order = torch.cat([index for index, _ in parts]).sort()
    if not torch.equal(index_R, torch.arange(len(index_R), device=index_R.device)):
        raise ValueError(
            f"{len(index_R)} response tokens of {len(parts)} parts, each index from 0 on must come once: "
            f"{index_R.tolist()}"
        )
    return torch.cat([values for _, values in parts])[order]


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, group, scale: float
) -> torch.Tensor:
    """Causal attention of this rank's queries over each whole block: [T/size, heads, head_dim], zigzag, like the
    inputs.

    Keys and values are gathered from the group; their gradients are summed over it and scattered.
    """
    from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

    rank, size = group.rank(), group.size()
    gathered = gather_from_sequence_parallel_region(torch.cat([key, value], -1), group=group)
    whole = gathered[torch.cat([indices(cu_seqlens, r, size) for r in range(size)]).argsort()]
    out, mine = [], 0
    for start, end in pairwise(cu_seqlens.tolist()):
        chunk = (end - start) // (2 * size)
        for index in (rank, 2 * size - 1 - rank):
            seen = (index + 1) * chunk  # tokens of the block up to this chunk's end
            q = query[mine : mine + chunk]
            k, v = whole[start : start + seen].chunk(2, -1)
            mask = torch.ones(chunk, seen, dtype=torch.bool, device=q.device).tril_(index * chunk)
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
            out.append(
                F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)[0].transpose(0, 1)
            )
            mine += chunk
    return torch.cat(out)
