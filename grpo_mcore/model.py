"""Hugging Face config -> TransformerConfig -> GPTModel whose output is the last hidden state.

Families: Qwen2, Qwen3, Llama (dense). On CUDA the layers are Transformer Engine's; on a CPU they are Megatron's own with
the RMSNorm and the packed attention below, their plain twins.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from grpo_mcore.config import InputError
from grpo_mcore.parallel import pipeline
from grpo_mcore.types import Microbatch

FAMILIES = ("qwen2", "qwen3", "llama")


class RMSNorm(torch.nn.Module):
    def __init__(self, config, hidden_size, eps=1e-5, **kwargs):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # Megatron sums its gradient over tp by this mark

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


@dataclass
class Blocks(PackedSeqParams):
    """What PackedAttention needs to know of a packed batch; to the rest of Megatron it is one sequence of T tokens."""

    lengths: list[int] = field(default_factory=list)  # of the blocks
    masks: list[torch.Tensor | None] = field(default_factory=list)  # bool [L, L], True where row sees column; None: plainly causal


def blocks_of(batch: Microbatch) -> Blocks:
    bounds = batch.cu_seqlens.tolist()
    masks = []
    for start, end in zip(bounds, bounds[1:]):
        branch = batch.branch_T[start:end]
        tree = (branch == 0) | (branch[:, None] == branch)  # the prompt, and one's own response
        masks.append(tree.tril_() if branch[-1] > 1 else None)
    whole = torch.tensor([0, bounds[-1]], dtype=torch.int32)
    return Blocks(
        qkv_format="thd", cu_seqlens_q=whole, cu_seqlens_kv=whole, max_seqlen_q=batch.max_seqlen, max_seqlen_kv=batch.max_seqlen,
        lengths=[end - start for start, end in zip(bounds, bounds[1:])], masks=masks)


class PackedAttention(MegatronModule):
    """Attention within each block of a packed batch: one SDPA call per block, on q, k, v of [T, heads, head_dim]."""

    def __init__(self, config, softmax_scale=None, **kwargs):
        super().__init__(config=config)
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(self, query, key, value, attention_mask, packed_seq_params=None, **kwargs):
        p: Blocks = packed_seq_params
        out = [
            F.scaled_dot_product_attention(
                *(x.transpose(0, 1)[None] for x in qkv), attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=True)[0].transpose(0, 1)
            for mask, *qkv in zip(p.masks, *(x.split(p.lengths) for x in (query, key, value)), strict=True)
        ]
        return torch.cat(out).flatten(1)


class Backbone(GPTModel):
    """GPTModel without its head's matrix product: returns [T, 1, D]; the head's weight is `head_weight`."""

    def _preprocess(self, input_ids, position_ids, *args, packed_seq_params=None, **kwargs):
        out = super()._preprocess(input_ids, position_ids, *args, packed_seq_params=packed_seq_params, **kwargs)
        if not isinstance(packed_seq_params, Blocks):
            return out
        # RoPE's table by each token's position in its sequence: siblings go on from the same prompt.
        return (out[0], out[1][position_ids[0]], *out[2:])

    def _postprocess(self, hidden_states, *args, **kwargs):
        return hidden_states

    @property
    def head_weight(self) -> torch.Tensor:
        """This tp rank's rows of the output matrix, [V, D]."""
        return self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else self.output_layer.weight


def load_hf_config(folder: str):
    """The folder's Hugging Face config, if this project can train it. Raises InputError."""
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as e:
        raise InputError("model", folder, f"no readable Hugging Face config ({str(e).splitlines()[0]})", "give a folder with a config.json, or a hub name") from e
    if config.model_type not in FAMILIES:
        raise InputError("model", folder, f"its model_type is {config.model_type!r}; this trains {', '.join(FAMILIES)}", "choose a model of these families")
    rope_settings(config)
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        raise InputError("model", folder, "its config has attention_bias or mlp_bias", "choose a model without these biases (Qwen2's own on q, k, v are fine)")
    if getattr(config, "use_sliding_window", False):
        raise InputError("model", folder, "its config asks for sliding-window attention", "set use_sliding_window to false in its config.json if the window is never reached")
    return config


def head_dim(hf_config) -> int:
    return getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads


def has_qkv_bias(hf_config) -> bool:
    return hf_config.model_type == "qwen2"


def has_qk_norm(hf_config) -> bool:
    return hf_config.model_type == "qwen3"


def check_tp(hf_config, tp: int) -> None:
    """The rules between tp and the model. Raises InputError."""
    heads, kv_heads = hf_config.num_attention_heads, hf_config.num_key_value_heads
    fits = [n for n in range(1, kv_heads + 1) if not any(x % n for x in (heads, kv_heads, hf_config.intermediate_size))]
    for name, size in (("attention heads", heads), ("key-value heads", kv_heads), ("FFN columns", hf_config.intermediate_size)):
        if size % tp:
            raise InputError("parallel.tp", tp, f"must divide the model's {size} {name}", f"use one of {', '.join(map(str, fits))}")


def rope_settings(hf_config) -> tuple[float, torch.Tensor | None]:
    """(base, inverse frequencies or None for the plain ones). Raises InputError for a scaling that also scales attention."""
    rope = hf_config.rope_parameters
    if rope["rope_type"] == "default":
        return rope["rope_theta"], None
    if rope["rope_type"] not in ("linear", "llama3"):
        raise InputError("model: rope_type", rope["rope_type"], "must be default, linear or llama3", "choose a model with one of these")
    inverse_frequencies, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](hf_config, device="cpu")
    return rope["rope_theta"], inverse_frequencies


def transformer_config(hf_config, *, tp: int, params_dtype: torch.dtype, cuda: bool) -> TransformerConfig:
    config = TransformerConfig(
        num_layers=hf_config.num_hidden_layers,
        hidden_size=hf_config.hidden_size,
        ffn_hidden_size=hf_config.intermediate_size,
        num_attention_heads=hf_config.num_attention_heads,
        num_query_groups=hf_config.num_key_value_heads,
        kv_channels=head_dim(hf_config),
        layernorm_epsilon=hf_config.rms_norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=has_qkv_bias(hf_config),
        qk_layernorm=has_qk_norm(hf_config),
        rotary_interleaved=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tp,
        params_dtype=params_dtype,
        pipeline_dtype=params_dtype,
        bf16=params_dtype == torch.bfloat16,
        # Every weight is loaded over the initial one, but only an initialised parameter is marked as split over tp,
        # and an unmarked shard is left out of the gradient norm.
        perform_initialization=True,
        use_cpu_initialization=not cuda,
        # Fused paths need CUDA extensions; their plain forms are what a CPU has.
        apply_rope_fusion=cuda,
        bias_activation_fusion=cuda,
        bias_dropout_fusion=cuda,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=cuda,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # variable_seq_lengths demands it of dense models too
    )
    pipeline.configure(config)
    return config


def build(hf_config, *, tp: int, params_dtype: torch.dtype, device: torch.device) -> Backbone:
    """A Backbone with uninitialised weights on `device`; hf_weights.load fills it."""
    cuda = device.type == "cuda"
    config = transformer_config(hf_config, tp=tp, params_dtype=params_dtype, cuda=cuda)
    base, inverse_frequencies = rope_settings(hf_config)
    if cuda:
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=has_qk_norm(hf_config))
    else:
        spec = _plain_spec(config)
    model = Backbone(
        config,
        spec,
        vocab_size=-(-hf_config.vocab_size // tp) * tp,  # no further padding: fewer rows to mask
        max_sequence_length=hf_config.max_position_embeddings,
        position_embedding_type="rope",
        rotary_base=base,
        share_embeddings_and_output_weights=hf_config.tie_word_embeddings,
        parallel_output=True,
    )
    if inverse_frequencies is not None:
        model.rotary_pos_emb.inv_freq = inverse_frequencies.to(model.rotary_pos_emb.inv_freq.device)
    return model.to(device)


def _plain_spec(config: TransformerConfig) -> TransformerBlockSubmodules:
    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    parts.sharded_state_dict_keys_map = {}  # it maps to Transformer Engine's names, which these layers do not have
    attention = parts.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=RMSNorm)


def shares_prompts(device: torch.device) -> bool:
    """Whether siblings may stand behind one copy of their prompt: not in Transformer Engine's packed attention."""
    return device.type == "cpu"


def hidden_states(model: torch.nn.Module, batch: Microbatch) -> torch.Tensor:
    """hidden_RD of the positions that predict the response tokens of `batch` (on the model's device)."""
    packed = blocks_of(batch) if shares_prompts(batch.token_ids_T.device) else PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=batch.cu_seqlens, cu_seqlens_kv=batch.cu_seqlens,
        max_seqlen_q=batch.max_seqlen, max_seqlen_kv=batch.max_seqlen)
    hidden_T1D = model(batch.token_ids_T[None], batch.position_ids_T[None], None, packed_seq_params=packed)
    return hidden_T1D[batch.position_R, 0]
