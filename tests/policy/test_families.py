"""What a config.json may say: published ones pass, a field that changes what is computed is refused by name.

What is used is computed as Hugging Face's model does, field by field, on a CPU. Not covered here: that vLLM does too.
"""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
import transformers as tf

from grpo_mcore.config.config import InputError
from grpo_mcore.parallel import topology
from grpo_mcore.policy import families, hf_weights, model
from tests import models
from tests.policy.test_policy import batch_of, connect, hf_logprobs, make_policy

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
    "Llama-2-7b-chat": {k: v for k, v in LLAMA.items() if k not in ("head_dim", "attention_bias", "mlp_bias")}
    | {"_name_or_path": "meta-llama/Llama-2-7b-chat-hf", "rope_scaling": None, "hidden_size": 4096, "max_length": 4096}
    | {"pad_token_id": 0, "num_key_value_heads": 32, "eos_token_id": 2, "intermediate_size": 11008}
    | {"tie_word_embeddings": False, "vocab_size": 32000, "torch_dtype": "float16"},
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


@pytest.mark.parametrize("config_class", [tf.Qwen2Config, tf.Qwen3Config, tf.LlamaConfig])
def test_every_field_of_a_familys_config_is_in_the_table(config_class):
    """One that a later transformers adds is in none: it passes as long as it says its default."""
    known = {
        *families.USED,
        *families.WITHOUT_EFFECT,
        *families.MUST_BE,
        "layer_types",
        "architectures",
        "sliding_window",
    }
    assert {f for f in config_class().to_dict() if not f.startswith("_")} <= known
    assert not families.USED & {*families.WITHOUT_EFFECT, *families.MUST_BE}
    assert not {*families.WITHOUT_EFFECT} & {*families.MUST_BE}


LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
LLAMA3 = models.KINDS["llama_llama3_rope"][2]["rope_parameters"]
# What makes a model of other shapes.
SHAPES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 48,
    "tie_word_embeddings": True,
}
# What makes another model of the same weights. The last two are of Llama's own RoPE.
NUMBERS = {
    "rms_norm_eps": [{"rms_norm_eps": 0.5}],
    "rope_parameters": [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
        {"rope_parameters": LINEAR},
        {"rope_parameters": LINEAR | {"factor": 2.0}},
        *[dict(rope_parameters=LLAMA3 | {key: LLAMA3[key] * 2}) for key in families.ROPE["llama3"]],
    ],
    "rope_scaling": [{"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 3.0}}],
    "rope_theta": [{"rope_parameters": None, "rope_theta": 100.0}],
}
FAMILY_KINDS = ("qwen2_untied", "qwen3", "llama_llama3_rope")


@pytest.fixture
def alone():
    yield connect()
    topology.disconnect()


def both_logprobs(folder: str | Path, alone) -> tuple[torch.Tensor, torch.Tensor]:
    """(the trainer's, Hugging Face's)"""
    b = batch_of(alone, max_tokens=10_000)
    return torch.cat(make_policy(str(folder), alone).logprobs(b.microbatches)), torch.cat(hf_logprobs(str(folder), b))


@pytest.mark.parametrize("kind", FAMILY_KINDS)
def test_a_model_of_other_shapes_is_computed_as_hugging_face_does(tmp_path, alone, kind):
    assert {*SHAPES, *NUMBERS, "max_position_embeddings", "model_type", "eos_token_id"} == families.USED
    refused = [] if families.FAMILIES[kind.split("_")[0]].reads_head_dim else ["head_dim"]
    for field, value in SHAPES.items():
        folder = tmp_path / field
        models.make(kind, folder, **{field: value})
        if field in refused:
            with pytest.raises(InputError, match="head_dim = 48, and engines compute qwen2 with hidden_size / num"):
                model.load_hf_config(str(folder))
            continue
        ours, theirs = both_logprobs(folder, alone)
        assert (ours - theirs).abs().max() < 1e-4, field


@pytest.mark.parametrize("field", NUMBERS)
@pytest.mark.parametrize("kind", FAMILY_KINDS)
def test_another_number_of_the_same_weights_is_computed_as_hugging_face_does(
    model_folders, tmp_path, alone, kind, field
):
    before, _ = both_logprobs(model_folders[kind], alone)
    shutil.copytree(model_folders[kind], tmp_path / "m")
    written = json.loads((tmp_path / "m/config.json").read_text())
    for change in NUMBERS[field]:
        ours, theirs = both_logprobs(folder_of(written | change, tmp_path / "m"), alone)
        assert (ours - theirs).abs().max() < 1e-4, change
        assert (ours - before).abs().max() > 1e-2, change  # else it would show nothing


VALUES = (
    *(None, True, False, 0, 1, 2, -1, 4, 16, 64, 10**12, 0.0, 0.5, 1e-3, 1.0, 1e300, float("nan"), float("inf")),
    *("", "x", "gelu", "silu", "linear", "yarn", "default", [], {}, [1], {"a": 1}),
    *([kind] * 2 for kind in ("full_attention", "sliding_attention")),
)
FIELDS = sorted({*families.USED, *families.WITHOUT_EFFECT, *families.MUST_BE, "layer_types", "sliding_window", "other"})
ROPE_FIELDS = (*LLAMA3, "attention_factor", "partial_rotary_factor", "type")


def test_whatever_a_config_says_it_is_computed_as_hugging_face_does_or_refused(model_folders, tmp_path, alone):
    """300 configs of which one or two fields hold anything; the oracle is run on each that is not refused."""
    rng, outcomes = random.Random(0), {"refused": 0, "computed": 0}
    kinds = (*FAMILY_KINDS, "llama_linear_rope")
    for kind in kinds:
        shutil.copytree(model_folders[kind], tmp_path / kind)
    for _ in range(300):
        folder = tmp_path / rng.choice(kinds)
        written = json.loads(Path(model_folders[folder.name], "config.json").read_text())
        for _ in range(rng.choice((1, 1, 2))):
            rope = written["rope_parameters"]
            inner = isinstance(rope, dict) and rng.random() < 0.3
            (rope if inner else written)[rng.choice(ROPE_FIELDS if inner else FIELDS)] = rng.choice(VALUES)
        folder_of(written, folder)
        try:
            hf_weights.check(folder, model.load_hf_config(str(folder)))
        except InputError:
            outcomes["refused"] += 1
            continue
        ours, theirs = both_logprobs(folder, alone)
        assert (ours - theirs).abs().max() < 1e-3, written  # an eps may make the norms' sums large
        outcomes["computed"] += 1
    assert min(outcomes.values()) > 75, outcomes


HARMLESS = {
    "attn_implementation": "flash_attention_2",
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
    "use_cache": False,
    "attention_dropout": 0.5,
    "pad_token_id": 5,
    "bos_token_id": 3,
    "eos_token_id": [1, 2],
    "max_window_layers": 1,
    "pretraining_tp": 2,
    "dtype": "bfloat16",
    "temperature": 0.1,
    "output_hidden_states": True,
    "chunk_size_feed_forward": 1,
}


@pytest.mark.parametrize("kind", FAMILY_KINDS)
def test_what_is_said_to_have_no_effect_has_none(model_folders, tmp_path, alone, kind):
    before, _ = both_logprobs(model_folders[kind], alone)
    shutil.copytree(model_folders[kind], tmp_path / "m")
    written = json.loads((tmp_path / "m/config.json").read_text())
    ours, theirs = both_logprobs(folder_of(written | HARMLESS, tmp_path / "m"), alone)
    assert torch.equal(ours, before) and (ours - theirs).abs().max() < 1e-4


NOT_COMPUTED = [
    {"num_attention_heads": 0},
    {"num_key_value_heads": 3},
    {"head_dim": 33},
    {"max_position_embeddings": 0},
    {"rms_norm_eps": float("nan")},
    {"rms_norm_eps": -1e-6},
    {"rope_theta": None},
    {"rope_theta": 0},
    {"rope_theta": "10000"},
    {"rope_theta": float("inf")},
    {"rope_scaling": {"factor": 4.0}},
    {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 2, 3]}},
    {"rope_scaling": {"type": "linear"}},
    {"rope_scaling": {"type": "linear", "factor": 0}},
    {"rope_scaling": {"type": "linear", "factor": "4"}},
    {"rope_scaling": {"type": "linear", "factor": 4.0, "attention_factor": 2.0}},
    {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    {"rope_scaling": {"full_attention": {"rope_type": "default"}}},
    *[dict(rope_scaling=LLAMA3 | {key: value}) for key in families.ROPE["llama3"] for value in (None, 0, "x", -2)],
    {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}},
]


@pytest.mark.parametrize("change", NOT_COMPUTED, ids=str)
@pytest.mark.parametrize("family", [QWEN2, LLAMA], ids=["qwen2", "llama"])
def test_a_number_that_nothing_can_be_computed_with_is_one_line(tmp_path, family, change):
    if change == {"num_key_value_heads": 3}:
        change = {"num_key_value_heads": 5}  # 3 divides 12
    with pytest.raises(InputError, match=f"model = '{tmp_path}': (its config.json has|no readable)"):
        model.load_hf_config(folder_of(family | change, tmp_path))


CHANGES = {
    "hidden_act": "gelu",
    "architectures": ["Qwen2ForSequenceClassification"],
    "bias": True,
    "qk_norm": True,
    "is_causal": False,
    "logit_scale": 0.5,
    "attention_bias": True,
    "mlp_bias": True,
    "use_sliding_window": True,
    "layer_types": ["full_attention"] * 27 + ["sliding_attention"],
    "rope_interleaved": True,
    "use_mrope": True,
    "partial_rotary_factor": 0.5,
    "is_encoder_decoder": True,
    "return_dict": False,
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


def test_a_window_is_refused_where_no_field_of_the_family_switches_it_off(tmp_path):
    with pytest.raises(InputError, match="sliding_window = 4096, and llama is not known to have it"):
        model.load_hf_config(folder_of(LLAMA | {"sliding_window": 4096}, tmp_path))


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
