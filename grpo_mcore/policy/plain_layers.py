"""The plain twins of Transformer Engine's layers, for a CPU: norm and attention, and what they are told of a packed
batch."""

import math
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from grpo_mcore.parallel import context
from grpo_mcore.parallel.topology import Topology
from grpo_mcore.types import Microbatch


class RMSNorm(torch.nn.Module):
    def __init__(self, config, hidden_size, eps=1e-5, **kwargs):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # By this mark Megatron sums its gradient over tp.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


@dataclass
class Blocks(PackedSeqParams):
    """What PackedAttention needs to know of a packed batch."""

    lengths: list[int] = field(default_factory=list)  # of the blocks, on all cp ranks together
    # bool [L, L], True where row sees column; None: plainly causal
    masks: list[torch.Tensor | None] = field(default_factory=list)


def packed_params(batch: Microbatch, topology: Topology) -> PackedSeqParams:
    """What attention and RoPE are told of a packed batch: Transformer Engine's the bounds of its blocks, the plain twin
    also who sees whom."""
    common = {"qkv_format": "thd", "max_seqlen_q": batch.max_seqlen, "max_seqlen_kv": batch.max_seqlen}
    if topology.device.type == "cuda":
        return PackedSeqParams(cu_seqlens_q=batch.cu_seqlens, cu_seqlens_kv=batch.cu_seqlens, **common)
    cu_seqlens, bounds = batch.cu_seqlens, list(pairwise(batch.cu_seqlens.tolist()))
    masks: list[torch.Tensor | None] = [None] * len(bounds)
    if topology.cp == 1:
        for k, (start, end) in enumerate(bounds):
            branch = batch.branch_T[start:end]
            tree = (branch == 0) | (branch[:, None] == branch)  # the prompt, and one's own response
            masks[k] = tree.tril_() if branch[-1] > 1 else None
        # One sequence to the rest of Megatron, whose RoPE the backbone looks up by position.
        cu_seqlens = torch.tensor([0, bounds[-1][1]], dtype=torch.int32)
    lengths = [end - start for start, end in bounds]
    return Blocks(cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, lengths=lengths, masks=masks, **common)


class PackedAttention(MegatronModule):
    """Attention within each block of a packed batch: SDPA on q, k, v of [T, heads, head_dim], block by block.

    With context parallelism every rank gathers all keys and values, and answers for its own queries: the plain twin of
    Transformer Engine's ring.
    """

    def __init__(self, config, softmax_scale=None, pg_collection=None, **kwargs):
        super().__init__(config=config)
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.cp_group = pg_collection.cp if config.context_parallel_size > 1 else None

    def forward(self, query, key, value, attention_mask, packed_seq_params=None, **kwargs):
        p: Blocks = packed_seq_params
        if self.cp_group is not None:
            return context.attention(query, key, value, p.cu_seqlens_q, self.cp_group, self.scale).flatten(1)
        out = []
        for mask, *qkv in zip(p.masks, *(x.split(p.lengths) for x in (query, key, value)), strict=True):
            q, k, v = (x.transpose(0, 1)[None] for x in qkv)
            block = F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=mask is None, scale=self.scale, enable_gqa=True
            )
            out.append(block[0].transpose(0, 1))
        return torch.cat(out).flatten(1)


def layer_spec(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Megatron's own layers with these parts, for one model chunk."""
    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    attention = parts.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, vp_stage), layer_norm=RMSNorm
    )
