"""The families that are trained, and every field that a config.json of theirs may have: what the model is made of, what
has no effect on it, and what must have the one value that is computed. A field that is none of these is refused unless
it says what the family's config says by default: a model that computes something else is not silently trained.
"""

from pathlib import Path

from grpo_mcore.config.config import InputError

FAMILIES = ("qwen2", "qwen3", "llama")

# Read by model.py, hf_weights.py, data and the engines.
USED = """
    model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
    head_dim max_position_embeddings rms_norm_eps tie_word_embeddings rope_theta rope_scaling rope_parameters
    eos_token_id
""".split()

# Names, versions and settings of other programs; what only generation, or training with dropout, would look at.
WITHOUT_EFFECT = """
    architectures dtype torch_dtype transformers_version name_or_path tokenizer_class use_cache
    initializer_range bos_token_id pad_token_id sep_token_id unk_token_id cls_token_id mask_token_id
    decoder_start_token_id attn_implementation pretraining_tp is_llama_config transformers.js_config
    unsloth_version unsloth_fixed attention_dropout hidden_dropout embd_pdrop resid_pdrop sliding_window
    max_window_layers output_attentions output_hidden_states output_scores return_dict return_dict_in_generate
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
    "is_encoder_decoder": ((False,), "it is a decoder"),
    "add_cross_attention": ((False,), "it is a decoder"),
    "tie_encoder_decoder": ((False,), "it is a decoder"),
    "pruned_heads": (({},), "all heads are there"),
    "quantization_config": ((), "quantised weights are not trained: name the model that it was made of"),
    "auto_map": ((), "its code is the model's own: name a model that transformers itself has"),
}
FULL = "full_attention"


def check(hf_config, folder: str | Path) -> None:
    """Of the folder's config.json, as read by transformers. Raises InputError, which names field and value."""
    written, _ = type(hf_config).get_config_dict(folder)  # `folder` may be the file itself
    default = type(hf_config)()
    for field in dict.fromkeys([*MUST_BE, *written]):
        value = getattr(hf_config, field, written.get(field))
        if value is None or field in USED or field in WITHOUT_EFFECT or field.startswith("_"):
            continue
        allowed, why = MUST_BE.get(field, ((), f"{hf_config.model_type} is not known to have it"))
        if field == "layer_types":
            allowed, why = ([FULL] * len(value),), f"all layers' attention is {FULL}"
        elif field not in MUST_BE and hasattr(default, field):
            allowed, why = (getattr(default, field),), "what another value would compute is not known"
        if value not in allowed:
            raise InputError("model", str(folder), f"its config.json has {field} = {value!r}, and {why}", REMEDY)


REMEDY = "choose another model, or mend its config.json if the field has no meaning for it"
