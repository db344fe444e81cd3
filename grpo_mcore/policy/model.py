"""Hugging Face config -> TransformerConfig -> GPTModel whose output is the last hidden state.

Families: Qwen2, Qwen3, Llama (dense). On CUDA the layers are Transformer Engine's; on a CPU their plain twins
(plain_layers.py).
"""

import importlib.metadata
from typing import Protocol

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from grpo_mcore.config.config import (
    FP8_ALIGN,
    PLAIN_ATTENTION_TOKENS,
    Config,
    InputError,
    Parallel,
    Precision,
    packed_alignment,
)
from grpo_mcore.loss.batch import Cost, Packing
from grpo_mcore.parallel import pipeline, vocab
from grpo_mcore.parallel.topology import Topology
from grpo_mcore.policy import families, plain_layers
from grpo_mcore.policy.families import head_dim
from grpo_mcore.types import Microbatch


class HFConfig(Protocol):
    """What is asked of a Hugging Face config."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    max_position_embeddings: int
    num_attention_heads: int
    num_hidden_layers: int
    num_key_value_heads: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    vocab_size: int


class Backbone(GPTModel):
    """One stage's GPTModel, without the head's matrix product: returns [T, 1, D]; the head's weight is
    `head_weight`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.post_process:
            # Called for its weight alone, but called: DDP gathers a weight when its module is called.
            self.output_layer.forward = lambda: self.output_layer.weight

    def _preprocess(self, input_ids, position_ids, *args, packed_seq_params=None, **kwargs):
        out = super()._preprocess(input_ids, position_ids, *args, packed_seq_params=packed_seq_params, **kwargs)
        if not isinstance(packed_seq_params, plain_layers.Blocks) or self.config.context_parallel_size > 1:
            return out
        # RoPE's table by each token's position in its sequence: siblings go on from the same prompt.
        return (out[0], out[1][position_ids[0]], *out[2:])

    def _postprocess(self, hidden_states, *args, **kwargs):
        return hidden_states

    @property
    def head_weight(self) -> torch.Tensor:
        """This tp rank's rows of the output matrix, [V, D], on the last stage."""
        tied_here = self.share_embeddings_and_output_weights and self.pre_process
        return self.embedding.word_embeddings.weight if tied_here else self.output_layer()

    def global_name(self, name: str) -> str:
        """A parameter's name in the whole model, from its name in this stage."""
        prefix = "decoder.layers."
        if not name.startswith(prefix):
            return name
        index, _, rest = name.removeprefix(prefix).partition(".")
        return f"{prefix}{self.decoder.layers[int(index)].layer_number - 1}.{rest}"


def load_hf_config(folder: str) -> HFConfig:
    """The folder's Hugging Face config, if this project can train it. Raises InputError."""
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as e:  # of many classes: JSON's, the validators' of its fields
        why = " ".join(str(e).split())
        raise InputError(
            "model",
            folder,
            f"no readable Hugging Face config ({type(e).__name__}: {why})",
            "give a folder with a config.json, or a hub name",
        ) from e
    if config.model_type not in families.FAMILIES:
        raise InputError(
            "model",
            folder,
            f"its model_type is {config.model_type!r}; this trains {', '.join(families.FAMILIES)}",
            "choose a model of these families",
        )
    families.check(config, folder)
    return config


def has_qkv_bias(hf_config) -> bool:
    return families.FAMILIES[hf_config.model_type].qkv_bias


def has_qk_norm(hf_config) -> bool:
    return families.FAMILIES[hf_config.model_type].qk_norm


def check_parallel(hf_config, parallel: Parallel, precision: Precision = Precision()) -> None:
    """The rules between the axes and the model. Raises InputError."""
    heads, kv_heads, layers = hf_config.num_attention_heads, hf_config.num_key_value_heads, hf_config.num_hidden_layers
    sizes = {"attention heads": heads, "key-value heads": kv_heads, "FFN columns": hf_config.intermediate_size}
    fits = [n for n in range(1, kv_heads + 1) if not any(size % n for size in sizes.values())]
    for name, size in sizes.items():
        if size % parallel.tp:
            raise InputError(
                "parallel.tp",
                parallel.tp,
                f"must divide the model's {size} {name}",
                f"use one of {', '.join(map(str, fits))}, and parallel.pp, parallel.cp or data parallel for the "
                f"other ranks",
            )
    stage = layers // parallel.pp
    for axis, n, size, what in (
        ("pp", parallel.pp, layers, f"the model's {layers} layers"),
        ("virtual_pp", parallel.virtual_pp, stage, f"the {stage} layers of a stage"),
    ):
        if size % n:
            raise InputError(f"parallel.{axis}", n, f"must divide {what}", f"use one of {_divisors(size)}")
    chunk = stage // parallel.virtual_pp
    if parallel.recompute == "full" and parallel.recompute_num_layers > chunk:
        raise InputError(
            "parallel.recompute_num_layers",
            parallel.recompute_num_layers,
            f"must be at most the {chunk} layers of a model chunk",
            "lower it",
        )
    if precision.fp8 is None:
        return
    bf16_layers = max(precision.fp8_first_layers_bf16, precision.fp8_last_layers_bf16)
    if bf16_layers > stage:
        raise InputError(
            "precision.fp8_first_layers_bf16 or fp8_last_layers_bf16",
            bf16_layers,
            f"must be at most the {stage} layers of a pipeline stage",
            "lower it",
        )
    width = (heads + 2 * kv_heads) * head_dim(hf_config)
    for name, size in (
        ("hidden size", hf_config.hidden_size),
        ("FFN columns of a tp rank", hf_config.intermediate_size // parallel.tp),
        ("attention columns of a tp rank", width // parallel.tp),
    ):
        if size % FP8_ALIGN:
            raise InputError(
                "precision.fp8",
                precision.fp8,
                f"needs a {name} that is a multiple of {FP8_ALIGN}, and it is {size}",
                "lower parallel.tp, or set precision.fp8=null",
            )


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)


def cost_of(hf_config: HFConfig) -> Cost:
    """What a sequence's head and attention cost beside its layers' matrix products, for balancing."""
    width, d = hf_config.num_attention_heads * head_dim(hf_config), hf_config.hidden_size
    kv_width = hf_config.num_key_value_heads * head_dim(hf_config)
    layer = d * (2 * width + 2 * kv_width + 3 * hf_config.intermediate_size)  # multiplications of one token
    layers = layer * hf_config.num_hidden_layers
    # A causal sequence of L tokens multiplies L^2/2 queries with keys, and as many weights with values.
    return Cost(head=hf_config.vocab_size * d / layers, quadratic=width / layer)


def rope_settings(hf_config) -> tuple[float, torch.Tensor | None]:
    """(base, inverse frequencies or None for the plain ones); families.ROPE's types scale nothing else."""
    rope = hf_config.rope_parameters
    if rope["rope_type"] == "default":
        return rope["rope_theta"], None
    inverse_frequencies, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](hf_config, device="cpu")
    return rope["rope_theta"], inverse_frequencies


def transformer_config(
    hf_config, *, parallel: Parallel = Parallel(), precision: Precision, cuda: bool
) -> TransformerConfig:
    params_dtype = getattr(torch, precision.params)
    config = TransformerConfig(
        **{name: getattr(hf_config, field) for field, name in families.SIZES.items() if name},
        kv_channels=head_dim(hf_config),
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=has_qkv_bias(hf_config),
        qk_layernorm=has_qk_norm(hf_config),
        rotary_interleaved=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.virtual_pp if parallel.virtual_pp > 1 else None,
        context_parallel_size=parallel.cp,
        sequence_parallel=parallel.sequence_parallel,
        # Interleaved stages send one direction at a time: batched, two stages, which are each other's next and
        # previous, would take one's forward message for the other's backward one.
        overlap_p2p_comm=parallel.virtual_pp > 1,
        batch_p2p_comm=parallel.virtual_pp == 1,
        **_recompute(parallel),
        params_dtype=params_dtype,
        pipeline_dtype=params_dtype,
        bf16=params_dtype == torch.bfloat16,
        **_fp8(precision),
        attention_backend=_attention_backend(precision, cuda),
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


def _recompute(parallel: Parallel) -> dict:
    if parallel.recompute == "none":
        return {}
    if parallel.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(parallel.recompute_modules)}
    return {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": parallel.recompute_num_layers,
    }


def has_flash_attention() -> bool:
    """Whether one of the packages is here that Transformer Engine takes for it."""
    names = ("flash-attn", "flash-attn-3", "flash-attn-4")
    return any(found for name in names for found in importlib.metadata.distributions(name=name))


def _attention_backend(precision: Precision, cuda: bool) -> AttnBackend:
    """Transformer Engine's choice, but for a deterministic run: cuDNN's deterministic backward pass over packed
    sequences asks for some 128 bytes a score on a Hopper GPU (Transformer Engine 2.20)."""
    if not (cuda and precision.params == "bfloat16" and torch.are_deterministic_algorithms_enabled()):
        return AttnBackend.auto
    return AttnBackend.flash if has_flash_attention() else AttnBackend.unfused


def _fp8(precision: Precision) -> dict:
    """Megatron makes Transformer Engine's recipe of these, and enters it layer by layer."""
    if precision.fp8 is None:
        return {}
    first, last = precision.fp8_first_layers_bf16, precision.fp8_last_layers_bf16
    return {
        "fp8": precision.fp8_format,
        "fp8_recipe": precision.fp8,
        "fp8_amax_history_len": precision.fp8_amax_history,
        "fp8_amax_compute_algo": "max",
        "first_last_layers_bf16": bool(first or last),
        "num_layers_at_start_in_bf16": first,
        "num_layers_at_end_in_bf16": last,
    }


def check_attention(config: Config, device: torch.device) -> None:
    """The rule between a deterministic run and what is installed. Raises InputError."""
    longest = config.longest_train_tokens
    if (
        device.type == "cuda"
        and config.deterministic
        and longest > PLAIN_ATTENTION_TOKENS
        and not has_flash_attention()
    ):
        raise InputError(
            "deterministic",
            True,
            f"needs flash-attn on a GPU for sequences of more than {PLAIN_ATTENTION_TOKENS} tokens, here {longest}",
            "pip install flash-attn, or set it to false",
        )


def build(hf_config, *, topology: Topology, precision: Precision) -> list[Backbone]:
    """This rank's model chunks (more than one if pipeline stages are interleaved), with random weights; hf_weights.load
    fills them."""
    parallel = topology.parallel
    config = transformer_config(hf_config, parallel=parallel, precision=precision, cuda=topology.device.type == "cuda")
    return [_chunk(hf_config, config, topology, index).to(topology.device) for index in range(parallel.virtual_pp)]


def _chunk(hf_config, config: TransformerConfig, topology: Topology, index: int) -> Backbone:
    parallel = topology.parallel
    vp_stage = index if parallel.virtual_pp > 1 else None
    base, inverse_frequencies = rope_settings(hf_config)
    if topology.device.type == "cuda":
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=has_qk_norm(hf_config))
    else:
        spec = plain_layers.layer_spec(config, vp_stage)
    chunk = Backbone(
        config,
        spec,
        vocab_size=-(-hf_config.vocab_size // parallel.tp) * parallel.tp,  # no further padding: fewer rows to mask
        max_sequence_length=hf_config.max_position_embeddings,
        pre_process=topology.pp_rank == 0 and index == 0,
        post_process=topology.is_last_stage and index == parallel.virtual_pp - 1,
        position_embedding_type="rope",
        rotary_base=base,
        share_embeddings_and_output_weights=hf_config.tie_word_embeddings,
        parallel_output=True,
        vp_stage=vp_stage,
    )
    if inverse_frequencies is not None:
        chunk.rotary_pos_emb.inv_freq = inverse_frequencies.to(chunk.rotary_pos_emb.inv_freq.device)
    return chunk


def stage_of(hf_config, layer: int, parallel: Parallel) -> int:
    """The pipeline rank that holds a layer (counted from 0): chunks go round the stages."""
    return layer // (hf_config.num_hidden_layers // (parallel.pp * parallel.virtual_pp)) % parallel.pp


def packing(hf_config, topology: Topology, precision: Precision, *, max_tokens: int) -> Packing:
    """How batches for this model and layout are cut."""
    parallel = topology.parallel
    return Packing(
        max_tokens=max_tokens,
        dp=topology.dp,
        dp_rank=topology.dp_rank,
        cp=parallel.cp,
        cp_rank=topology.cp_rank,
        align_tokens=packed_alignment(parallel, precision),
        microbatch_multiple=parallel.pp if parallel.virtual_pp > 1 else 1,
        # Siblings behind one copy of their prompt need an attention that knows trees: PackedAttention alone, and not
        # over cp.
        share_prompts=topology.device.type == "cpu" and parallel.cp == 1,
        cost=cost_of(hf_config),
    )


def hidden_states(stage: torch.nn.Module, batch: Microbatch, topology: Topology) -> torch.Tensor:
    """What one model chunk makes of `batch` (on its device): what the next one needs, or from the last chunk hidden_RD
    of the positions that predict the response tokens."""
    packed = plain_layers.packed_params(batch, topology)
    hidden_T1D = stage(batch.token_ids_T[None], batch.position_ids_T[None], None, packed_seq_params=packed)
    if not unwrapped(stage).post_process:
        return hidden_T1D
    return vocab.rows(
        hidden_T1D[:, 0], batch.position_R, topology.head_group, sequence_parallel=topology.parallel.sequence_parallel
    )


def unwrapped(stage: Backbone | DistributedDataParallel) -> Backbone:
    """The model chunk within DDP's wrapper, or itself."""
    return stage if isinstance(stage, Backbone) else stage.module
