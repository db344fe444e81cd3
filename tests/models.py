"""Tiny random models of every family the project trains."""

from pathlib import Path

import torch
import transformers as tf

_SIZES = dict(
    vocab_size=91,
    hidden_size=128,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=None,
    eos_token_id=1,
    pad_token_id=0,
)
_LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
KINDS = {
    "qwen2_tied": (tf.Qwen2ForCausalLM, tf.Qwen2Config, dict(tie_word_embeddings=True)),
    "qwen2_untied": (
        tf.Qwen2ForCausalLM,
        tf.Qwen2Config,
        dict(tie_word_embeddings=False, rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
    ),
    "qwen2_deep": (
        tf.Qwen2ForCausalLM,
        tf.Qwen2Config,
        dict(tie_word_embeddings=True, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4),
    ),
    "qwen3": (tf.Qwen3ForCausalLM, tf.Qwen3Config, dict(tie_word_embeddings=False, head_dim=64)),
    "llama_llama3_rope": (
        tf.LlamaForCausalLM,
        tf.LlamaConfig,
        dict(vocab_size=128, tie_word_embeddings=True, rope_parameters=_LLAMA3),
    ),
    "llama_linear_rope": (
        tf.LlamaForCausalLM,
        tf.LlamaConfig,
        dict(
            vocab_size=128,
            tie_word_embeddings=False,
            rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=4.0),
        ),
    ),
}


def make(kind: str, folder: Path, dtype: torch.dtype = torch.float32, **changes) -> str:
    """`changes`: of the config's fields."""
    model_class, config_class, extra = KINDS[kind]
    torch.manual_seed(7)
    model = model_class(config_class(**{**_SIZES, **extra, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Biases and norms start at 0 and 1: a mix-up among them would not show.
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            elif "embed" not in name:
                parameter.mul_(4)
    model.to(dtype).save_pretrained(folder)
    return str(folder)
