"""What a config.json may say: published ones pass, a field that changes what is computed is refused by name.

Not covered here: that what is used is computed as Hugging Face does (test_policy.py).
"""

import json
import shutil

import pytest

from grpo_mcore.config.config import InputError
from grpo_mcore.policy import families, model

QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "initializer_range": 0.02,
    "intermediate_size": 8960,
    "max_position_embeddings": 131072,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.44.0",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
PUBLISHED = {
    "DeepSeek-R1-Distill-Qwen-1.5B": QWEN2,
    "Qwen2.5-7B-Instruct": QWEN2
    | {"hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4, "sliding_window": 131072}
    | {"rope_theta": 1000000.0, "max_window_layers": 28, "intermediate_size": 18944, "eos_token_id": 151645},
    "Qwen3-8B": {k: v for k, v in QWEN2.items() if k != "use_mrope"}
    | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "head_dim": 128}
    | {"rope_scaling": None, "sliding_window": None, "max_window_layers": 36, "num_hidden_layers": 36},
    "Llama-3.2-1B-Instruct": LLAMA,
    "SmolLM2-135M-Instruct": {k: v for k, v in LLAMA.items() if k not in ("rope_scaling", "head_dim")}
    | {"is_llama_config": True, "rope_interleaved": False, "rope_scaling": None, "hidden_size": 576}
    | {"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "eos_token_id": 2, "pad_token_id": 2}
    | {"unk_token_id": 0}  # as transformers writes it, from a GGUF
    | {"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}}},
}


def folder_of(written: dict, path) -> str:
    (path / "config.json").write_text(json.dumps(written))
    return str(path)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_pass(tmp_path, name):
    assert model.load_hf_config(folder_of(PUBLISHED[name], tmp_path)).model_type == PUBLISHED[name]["model_type"]


@pytest.mark.parametrize("kind", ["qwen2_tied", "qwen2_untied", "qwen3", "llama_llama3_rope", "llama_linear_rope"])
def test_what_transformers_itself_writes_passes(model_folders, kind):
    families.check(model.load_hf_config(model_folders[kind]), model_folders[kind])


CHANGES = {
    "hidden_act": "gelu",
    "attention_bias": True,
    "mlp_bias": True,
    "use_sliding_window": True,
    "layer_types": ["full_attention"] * 27 + ["sliding_attention"],
    "rope_interleaved": True,
    "use_mrope": True,
    "partial_rotary_factor": 0.5,
    "is_encoder_decoder": True,
    "pruned_heads": {"1": [0]},
    "quantization_config": {"quant_method": "fp8"},
    "auto_map": {"AutoModelForCausalLM": "modeling.Mine"},
    "embedding_multiplier": 12.0,  # of relatives of Llama
    "logits_scaling": 8.0,
    "residual_multiplier": 0.22,
    "final_logit_softcapping": 30.0,
    "num_experts": 8,
}


@pytest.mark.parametrize("field", CHANGES)
def test_a_field_that_changes_the_computation_is_refused_by_name_and_value(tmp_path, field):
    folder = folder_of(QWEN2 | {field: CHANGES[field]}, tmp_path)
    with pytest.raises(InputError) as e:
        model.load_hf_config(folder)
    assert field in str(e.value)


def test_what_is_null_or_begins_with_an_underscore_or_is_the_default_says_nothing(tmp_path):
    written = QWEN2 | {"_name_or_path": "x", "something": None, "tie_encoder_decoder": False, "pad_token_id": 3}
    model.load_hf_config(folder_of(written, tmp_path))


@pytest.mark.parametrize("contents", ["", "{", "[]", "{}", '{"model_type": "qwen2", "hidden_size": "many"}', "\0"])
def test_a_config_that_cannot_be_read_is_one_line(tmp_path, contents):
    (tmp_path / "config.json").write_text(contents)
    with pytest.raises(InputError, match="no readable Hugging Face config"):
        model.load_hf_config(str(tmp_path))


def test_a_model_whose_activation_is_another_was_scored_wrongly_and_is_refused(model_folders, tmp_path):
    shutil.copytree(model_folders["llama_linear_rope"], tmp_path / "m")
    written = json.loads((tmp_path / "m/config.json").read_text())
    with pytest.raises(InputError, match="hidden_act = 'gelu', and the MLP's activation is silu"):
        model.load_hf_config(folder_of(written | {"hidden_act": "gelu"}, tmp_path / "m"))
