"""A GGUF becomes the model that it holds, whole, or is refused. The files are written here with the gguf library.

Not covered here: quantised tensors (test_launch.py's SmolLM2 has them).
"""

import shutil
from pathlib import Path

import pytest
import torch
import transformers as tf
from gguf import GGUFWriter, TokenType

from grpo_mcore.config.config import InputError
from grpo_mcore.policy import families, model_folder

LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOKENS = [*"abcdefghijklmnopqrstuvwxy", "ab", "<eos>"]
SIZES = dict(hidden_size=256, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
FAMILY = {"llama": tf.LlamaForCausalLM, "qwen2": tf.Qwen2ForCausalLM, "qwen3": tf.Qwen3ForCausalLM}


def model_of(family: str, seed: int = 0, *, tied: bool = False):
    torch.manual_seed(seed)
    config = FAMILY[family].config_class(vocab_size=len(TOKENS), tie_word_embeddings=tied, eos_token_id=26, **SIZES)
    model = FAMILY[family](config)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((p + torch.randn_like(p) * 0.1).bfloat16())  # what bfloat16 holds, in float32
    return model


def name_of(hf: str) -> str:
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    name, _, kind = hf.rpartition(".")
    if name in top:
        return f"{top[name]}.{kind}"
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{LAYER[rest]}.{kind}"


def tensors_of(model) -> dict[str, torch.Tensor]:
    """As llama.cpp names and writes them: it turns pairs, so of a Llama it interleaves the halves of q's and k's."""
    config, out = model.config, {}
    for hf, tensor in model.state_dict().items():
        if hf == "lm_head.weight" and config.tie_word_embeddings:
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(hf.split(".")[-2])
        if config.model_type == "llama" and heads:
            tensor = tensor.view(heads, 2, -1, tensor.shape[-1]).transpose(1, 2).reshape(tensor.shape)
        out[name_of(hf)] = tensor
    return out


def write(path: Path, model, *, fields: dict | None = None, tensors: dict | None = None) -> str:
    """`fields` are more of the model's, `tensors` more of its, or None instead of one."""
    path.parent.mkdir(exist_ok=True)
    config = model.config
    writer = GGUFWriter(path, config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    for name, value in (fields or {}).items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(name.replace("ARCH", config.model_type), value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([TokenType.NORMAL] * 26 + [TokenType.CONTROL])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(26)
    for name, tensor in (tensors_of(model) | (tensors or {})).items():
        if tensor is not None:
            writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("llama", True), ("qwen2", False), ("qwen3", True)])
def test_a_gguf_of_each_family_is_the_model_that_it_was_written_of(tmp_path, family, tied):
    model = model_of(family, tied=tied)
    ones = {"rope_freqs.weight": torch.ones(64)}  # the plain RoPE
    folder = model_folder.local_folder(write(tmp_path / "m.gguf", model, tensors=ones), tmp_path / "cache")
    read = tf.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    families.check(read.config, folder)
    assert {tensor.dtype for tensor in read.state_dict().values()} == {torch.bfloat16}
    assert all(torch.equal(read.state_dict()[name], tensor.bfloat16()) for name, tensor in model.state_dict().items())
    tokens = torch.arange(20)[None]
    with torch.no_grad():  # the file holds eps in float32
        torch.testing.assert_close(read.float()(tokens).logits, model(tokens).logits, atol=1e-4, rtol=1e-4)


def test_a_gguf_is_what_it_holds_and_not_its_name_or_its_size(tmp_path):
    """The two differ in one weight; at first, in the middle and at the end they are alike."""
    first, second = model_of("llama"), model_of("llama")
    with torch.no_grad():
        second.model.layers[0].self_attn.o_proj.weight[0, 0] += 1
    paths = [write(tmp_path / place / "m.gguf", m) for place, m in (("a", first), ("b", second))]
    assert Path(paths[0]).stat().st_size == Path(paths[1]).stat().st_size
    folders = [model_folder.local_folder(path, tmp_path / "cache") for path in (*paths, paths[0])]
    assert folders[0] == folders[2]
    for folder, model in zip(folders, (first, second), strict=False):
        read = tf.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
        assert all(torch.equal(read[name], tensor.bfloat16()) for name, tensor in model.state_dict().items())
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(InputError, match="there is no such file"):
        model_folder.local_folder(paths[0], tmp_path / "cache")


@pytest.mark.parametrize(
    ("family", "given", "words"),
    [
        ("llama", {"tensors": {"rope_freqs.weight": torch.full((64,), 8.0)}}, "has a tensor rope_freqs.weight, which"),
        ("llama", {"tensors": {"blk.0.attn_q.bias": torch.ones(256)}}, "has a tensor blk.0.attn_q.bias, which is not"),
        ("llama", {"tensors": {"blk.1.attn_output.weight": None}}, "lacks model.layers.1.self_attn.o_proj.weight"),
        ("qwen2", {"tensors": {"blk.1.attn_q.bias": None}}, "lacks model.layers.1.self_attn.q_proj.bias"),
        ("qwen2", {"fields": {"ARCH.rope.scaling.type": "yarn"}}, "has qwen2.rope.scaling.type = 'yarn', which is not"),
        ("llama", {"fields": {"ARCH.rope.scaling.factor": 4.0}}, "has llama.rope.scaling.factor = 4.0, which is not"),
        ("llama", {"fields": {"ARCH.expert_count": 8}}, "has llama.expert_count = 8, which is not read"),
        ("llama", {"fields": {"ARCH.attention.sliding_window": 64}}, "has llama.attention.sliding_window = 64"),
        ("llama", {"fields": {"split.count": 2}}, "has split.count = 2, which is not read"),
    ],
)
def test_what_would_be_left_out_without_a_word_is_refused_by_name(tmp_path, family, given, words):
    write(tmp_path / "m.gguf", model_of(family), **given)
    with pytest.raises(InputError, match=words):
        model_folder.local_folder(str(tmp_path / "m.gguf"), tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("m-*"))


def test_what_says_nothing_passes(tmp_path):
    fields = {"ARCH.rope.scaling.type": "none", "ARCH.expert_count": 0, "ARCH.attention.key_length": 128}
    write(tmp_path / "m.gguf", model_of("llama"), fields=fields | {"split.count": 1})
    model_folder.local_folder(str(tmp_path / "m.gguf"), tmp_path / "cache")


@pytest.mark.parametrize("contents", [b"", b"GGUF", b"GGUF" + 100 * b"\xff", b"version https://git-lfs"])
def test_a_gguf_that_cannot_be_read_is_one_line(tmp_path, contents):
    (tmp_path / "m.gguf").write_bytes(contents)
    words = "is Git LFS's pointer" if contents.startswith(b"version") else r"cannot be read \("
    with pytest.raises(InputError, match=f"m.gguf'?: {words}"):
        model_folder.local_folder(str(tmp_path / "m.gguf"), tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("m-*"))


def test_a_gguf_of_another_family_or_cut_is_refused(tmp_path):
    path = Path(write(tmp_path / "m.gguf", model_of("llama")))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match=r"cannot be read \("):
        model_folder.local_folder(str(path), tmp_path / "cache")
    writer = GGUFWriter(path, "gemma3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(InputError, match="is of a gemma3; this trains qwen2, qwen3, llama"):
        model_folder.local_folder(str(path), tmp_path / "cache")
