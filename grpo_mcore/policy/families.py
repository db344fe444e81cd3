"""The families that are trained, and every field that a config.json of theirs may have: what the model is made of, what
has no effect on it, and what must have the one value that is computed. A field that is none of these is refused unless
it says what the family's config says by default: a model that computes something else is not silently trained.
"""

from dataclasses import dataclass
from pathlib import Path

from grpo_mcore.config.bounds import POSITIVE
from grpo_mcore.config.config import InputError


@dataclass(frozen=True)
class Family:
    """What sets it apart from the others."""

    architectures: tuple[str, ...]  # names of it, by which vLLM picks its model
    qkv_bias: bool = False
    qk_norm: bool = False
    reads_head_dim: bool = True  # else heads are hidden_size / num_attention_heads wide, in vLLM at least


FAMILIES = {
    "qwen2": Family(("Qwen2ForCausalLM",), qkv_bias=True, reads_head_dim=False),
    "qwen3": Family(("Qwen3ForCausalLM",), qk_norm=True),
    "llama": Family(("LlamaForCausalLM", "LLaMAForCausalLM")),
}

# Positive numbers -> Megatron's name (None: Megatron is told of it in another way).
SIZES = {
    "vocab_size": None,
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": None,
    "max_position_embeddings": None,
    "rms_norm_eps": "layernorm_epsilon",
}
# rope_type -> the positive numbers that it is computed with besides rope_theta. Older files say rope_scaling and type.
ROPE: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# Read by model.py, hf_weights.py, data and the engines.
USED = {*SIZES, *"model_type tie_word_embeddings rope_theta rope_scaling rope_parameters eos_token_id".split()}

# Names, versions and settings of other programs; what only generation, or training with dropout, would look at.
WITHOUT_EFFECT = """
    dtype torch_dtype transformers_version name_or_path tokenizer_class use_cache
    initializer_range bos_token_id pad_token_id sep_token_id unk_token_id cls_token_id mask_token_id
    decoder_start_token_id attn_implementation pretraining_tp is_llama_config transformers.js_config
    unsloth_version unsloth_fixed attention_dropout hidden_dropout embd_pdrop resid_pdrop hidden_dropout_prob
    attention_probs_dropout_prob gradient_checkpointing max_sequence_length model_max_length
    max_window_layers output_attentions output_hidden_states output_scores return_dict_in_generate
    torchscript chunk_size_feed_forward id2label label2id problem_type finetuning_task task_specific_params
    do_sample temperature top_k top_p typical_p min_length max_length num_beams num_beam_groups
    num_return_sequences early_stopping length_penalty repetition_penalty diversity_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids suppress_tokens begin_suppress_tokens forced_bos_token_id
    forced_eos_token_id exponential_decay_length_penalty remove_invalid_values prefix
""".split()

# Field -> (the values that are computed, why not another). Nothing is computed of a field that is not there, or null.
MUST_BE: dict[str, tuple[tuple[object, ...], str]] = {
    "hidden_act": (("silu", "swish"), "the MLP's activation is silu"),
    "attention_bias": ((False,), "Qwen2 alone has biases, on q, k and v"),
    "mlp_bias": ((False,), "the MLP has no biases"),
    "use_sliding_window": (
        (False,),
        "attention is full; if the window is never reached, set it to false in config.json",
    ),
    "rope_interleaved": ((False,), "RoPE turns the halves of a head"),
    "use_mrope": ((False,), "RoPE is of one axis"),
    "partial_rotary_factor": ((1, 1.0), "RoPE turns whole heads"),
    "return_dict": ((True,), "transformers' own model, which proves an export, does not run without"),
    # Of no meaning to transformers in these families; vLLM computes by them.
    "bias": ((False,), "Qwen2 alone has biases, on q, k and v"),
    "qk_norm": ((False,), "Qwen3 alone has norms of q and k, and always"),
    "is_causal": ((True,), "attention is causal"),
    "logit_scale": ((1, 1.0), "logits are not scaled"),
    "is_encoder_decoder": ((False,), "it is a decoder"),
    "add_cross_attention": ((False,), "it is a decoder"),
    "tie_encoder_decoder": ((False,), "it is a decoder"),
    "pruned_heads": (({},), "all heads are there"),
    "quantization_config": ((), "quantised weights are not trained: name the model that it was made of"),
    "auto_map": ((), "its code is the model's own: name a model that transformers itself has"),
}
FULL = "full_attention"
REMEDY = "choose another model, or mend its config.json if the field has no meaning for it"


def check(hf_config, folder: str | Path) -> None:
    """Of the folder's config.json, as read by transformers. Raises InputError, which names field and value."""
    written, _ = type(hf_config).get_config_dict(folder)  # `folder` may be the file itself
    default = type(hf_config)()
    family = FAMILIES[hf_config.model_type]
    for field in dict.fromkeys([*MUST_BE, *written]):
        value = getattr(hf_config, field, written.get(field))
        if field in USED or field in WITHOUT_EFFECT or field.startswith("_"):
            continue
        if value is None and getattr(default, field, None) is None:
            continue
        allowed, why = MUST_BE.get(field, ((), f"{hf_config.model_type} is not known to have it"))
        if field == "layer_types":
            allowed, why = ([FULL] * len(value),), f"all layers' attention is {FULL}"
        elif field == "architectures":
            allowed, why = tuple([n] for n in family.architectures), f"this trains {family.architectures[0]}"
        elif field not in MUST_BE and hasattr(default, field):
            allowed, why = (getattr(default, field),), "what another value would compute is not known"
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
            raise _refused(folder, field, value, why)
    _check_sizes(hf_config, family, folder)
    _check_rope(hf_config.rope_parameters, folder)


def head_dim(hf_config) -> int:
    width: int = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads
    return width


def _check_sizes(hf_config, family: Family, folder: str | Path) -> None:
    for field in SIZES:
        value = getattr(hf_config, field, None)
        if not _is_positive(value) and (field, value) != ("head_dim", None):
            raise _refused(folder, field, value, POSITIVE.constraint)
    heads, groups = hf_config.num_attention_heads, hf_config.num_key_value_heads
    if heads % groups:
        raise _refused(folder, "num_key_value_heads", groups, f"must divide its {heads} attention heads")
    if head_dim(hf_config) % 2:
        raise _refused(folder, "head_dim", head_dim(hf_config), "RoPE turns the halves of a head")
    if not family.reads_head_dim and head_dim(hf_config) != hf_config.hidden_size // heads:
        why = f"engines compute {hf_config.model_type} with hidden_size / num_attention_heads"
        raise _refused(folder, "head_dim", head_dim(hf_config), why)


def _check_rope(rope: dict[str, object], folder: str | Path) -> None:
    """Transformers leaves out what a rope_type does not have, and so would we: a model of another RoPE."""
    kind = rope.get("rope_type")
    if not isinstance(kind, str) or kind not in ROPE:
        raise _refused(folder, "rope_type", kind, f"must be {', '.join(ROPE)}")
    numbers = ("rope_theta", *ROPE[kind])
    for field in dict.fromkeys([*numbers, *rope]):
        value, where = rope.get(field), f"{field} of RoPE"
        if field in numbers:
            if not _is_positive(value):
                raise _refused(folder, where, value, POSITIVE.constraint)
        elif field == "partial_rotary_factor":
            if isinstance(value, bool) or value != 1:
                raise _refused(folder, where, value, "RoPE turns whole heads")
        elif value is not None and field not in ("rope_type", "type"):
            raise _refused(folder, where, value, f"RoPE of rope_type {kind} is not known to have it")
    if kind == "llama3" and not rope["low_freq_factor"] < rope["high_freq_factor"]:  # type: ignore[operator]
        raise _refused(folder, "low_freq_factor of RoPE", rope["low_freq_factor"], "must be below high_freq_factor")


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and POSITIVE.allows(value)


def _refused(folder: str | Path, field: str, value: object, why: str) -> InputError:
    return InputError("model", str(folder), f"its config.json has {field} = {value!r}, and {why}", REMEDY)
