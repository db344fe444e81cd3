"""Hugging Face -> Megatron -> Hugging Face, bit for bit, on tensor and pipeline ranks; and what is refused.

Not covered here: that the model computes the same (test_policy.py); the program around it (test_launch.py).
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from grpo_mcore.config import config
from grpo_mcore.config.config import InputError
from grpo_mcore.parallel import topology
from grpo_mcore.policy import hf_weights, model
from tests import models
from tests.dist import spawn


def chunks_of(folder, topo, precision=config.Precision(params="float32")) -> tuple:
    """(chunks with the folder's weights, its config)"""
    hf_config = model.load_hf_config(str(folder))
    chunks = model.build(hf_config, topology=topo, precision=precision)
    hf_weights.load(chunks, hf_config, folder, topo)
    return chunks, hf_config


def save(out, chunks, hf_config, topo, side_files_from) -> None:
    tensors = hf_weights.export(chunks, hf_config, topo)
    if topo.is_driver:
        dtype, shapes = next(chunks[0].parameters()).dtype, hf_weights.shapes(hf_config)
        hf_weights.save_folder(out, tensors, side_files_from, shapes=shapes, dtype=dtype)
    assert not list(tensors)  # the other ranks take part


def round_trip(folders: dict[str, str], axes: dict[str, int], out: str) -> None:
    topo = topology.connect(config.Parallel(**axes), device=torch.device("cpu"), timeout_s=60, seed=1)
    for kind, folder in folders.items():
        with hf_weights.Reader(folder) as reader:
            precision = config.Precision(params=str(reader.dtype()).removeprefix("torch."))
        chunks, hf_config = chunks_of(folder, topo, precision)
        save(f"{out}/{kind}", chunks, hf_config, topo, folder)
    topology.disconnect()


@pytest.mark.parametrize(
    ("ranks", "axes"), [(1, {}), (4, {"tp": 2, "pp": 2}), (2, {"pp": 2, "virtual_pp": 2})], ids=str
)
def test_round_trip_is_bit_exact_in_every_family(model_folders, tmp_path, ranks, axes):
    folders = {**model_folders, "qwen3_bf16": models.make("qwen3", tmp_path / "bf16", torch.bfloat16)}
    if "virtual_pp" in axes:
        folders = {"qwen2_deep": model_folders["qwen2_deep"]}  # the only one with 4 layers
    spawn(round_trip, ranks, folders, axes, str(tmp_path))
    for kind, folder in folders.items():
        before, after = load_file(f"{folder}/model.safetensors"), load_file(f"{tmp_path}/{kind}/model.safetensors")
        assert set(before) == set(after)
        for name, tensor in before.items():
            assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), (kind, name)
        assert hf_weights.shapes(model.load_hf_config(folder)) == {name: tuple(t.shape) for name, t in before.items()}
        before, after = (Path(f, "config.json").read_text() for f in (folder, tmp_path / kind))
        assert json.loads(before) == json.loads(after)


@pytest.fixture
def alone():
    yield topology.connect(config.Parallel(), device=torch.device("cpu"), timeout_s=60, seed=1)
    topology.disconnect()


def load_changed(folder: str, changed, alone, name: str, tensor: torch.Tensor | None) -> None:
    """Loads the folder with another tensor of that name; None: without it."""
    shutil.copytree(folder, changed)
    tensors = {k: x for k, x in load_file(changed / "model.safetensors").items() if k != name}
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    chunks_of(changed, alone)


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("model.layers.1.self_attn.k_proj.bias", None, "is missing"),
        ("model.layers.0.self_attn.q_norm.weight", torch.ones(16), "is one too many"),
        ("model.layers.0.mlp.down_proj.weight", torch.ones(64, 95), "must have shape"),
    ],
    ids=["missing", "extra", "misshapen"],
)
def test_a_missing_extra_or_misshapen_tensor_is_named(model_folders, tmp_path, alone, name, tensor, words):
    with pytest.raises(InputError, match=f"{re.escape(name)}.*{words}"):
        load_changed(model_folders["qwen2_tied"], tmp_path / "changed", alone, name, tensor)


NO_WEIGHTS = {
    "nothing": b"",
    "a pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 9\n",
    "a web page": b"<!DOCTYPE html><html></html>",
    "a pickle": b"PK\x03\x04" + bytes(200),
}


@pytest.mark.parametrize("case", [*NO_WEIGHTS, "a part of it"])
def test_a_file_that_is_no_safetensors_is_named(model_folders, tmp_path, case):
    shutil.copytree(model_folders["qwen2_tied"], tmp_path / "m")
    path = tmp_path / "m/model.safetensors"
    path.write_bytes(NO_WEIGHTS.get(case, path.read_bytes()[:-100]))
    words = "Git LFS's pointer to a file" if case == "a pointer" else r"no safetensors file \("
    with pytest.raises(InputError, match=rf"model = '{path}': is {words}"):
        hf_weights.Reader(tmp_path / "m")


@pytest.mark.parametrize("index", ["", "{}", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_an_index_that_is_none_is_named(model_folders, tmp_path, index):
    shutil.copytree(model_folders["qwen2_tied"], tmp_path / "m")
    (tmp_path / "m" / hf_weights.INDEX).write_text(index)
    with pytest.raises(InputError, match="model.safetensors.index.json'?: is no index of weights"):
        hf_weights.Reader(tmp_path / "m")


def test_a_tensor_in_two_files_and_one_that_its_file_lacks_are_named(model_folders, tmp_path):
    folder = Path(shutil.copytree(model_folders["qwen2_tied"], tmp_path / "m"))
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    tensors = load_file(folder / "a.safetensors")
    norm, hf_config = {"model.norm.weight": tensors.pop("model.norm.weight")}, model.load_hf_config(str(folder))
    index = dict.fromkeys(tensors, "a.safetensors") | dict.fromkeys(norm, "b.safetensors")
    (folder / hf_weights.INDEX).write_text(json.dumps({"weight_map": index}))
    save_file(norm, folder / "b.safetensors")
    with pytest.raises(InputError, match="b.safetensors': has model.norm.weight, and so has another file"):
        hf_weights.check(folder, hf_config)
    save_file(tensors, folder / "a.safetensors")
    hf_weights.check(folder, hf_config)
    save_file({"x": torch.ones(1)}, folder / "b.safetensors")
    with pytest.raises(InputError, match="b.safetensors': lacks model.norm.weight, which .*index.json places there"):
        hf_weights.check(folder, hf_config)


def test_old_files_buffers_of_rope_are_no_weights(model_folders, tmp_path, alone):
    folder, name = model_folders["llama_linear_rope"], "model.layers.0.self_attn.rotary_emb.inv_freq"
    load_changed(folder, tmp_path / "m", alone, name, torch.ones(16))
    hf_weights.check(tmp_path / "m", model.load_hf_config(folder))


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (None, "model.norm.weight is missing"),
        (torch.ones(127), r"tensor model.norm.weight = \(127,\): must have shape \(128,\)"),
        (torch.ones(128).to(torch.float8_e4m3fn), "model.norm.weight is of F8_E4M3, and weights are of BF16, F32, F16"),
        (torch.ones(128, dtype=torch.int8), "model.norm.weight is of I8"),
    ],
)
def test_names_shapes_and_dtypes_are_looked_at_before_weights_are_read(model_folders, tmp_path, tensor, words):
    folder = model_folders["qwen2_tied"]
    shutil.copytree(folder, tmp_path / "m")
    tensors = {k: x for k, x in load_file(f"{folder}/model.safetensors").items() if k != "model.norm.weight"}
    save_file(tensors | ({} if tensor is None else {"model.norm.weight": tensor}), tmp_path / "m/model.safetensors")
    hf_weights.check(folder, model.load_hf_config(folder))
    with pytest.raises(InputError, match=words):
        hf_weights.check(tmp_path / "m", model.load_hf_config(folder))


@pytest.mark.parametrize("key", ["dtype", "torch_dtype", None])
def test_an_export_says_what_its_tensors_are_and_has_all_that_a_reader_needs(model_folders, tmp_path, key):
    source = shutil.copytree(model_folders["qwen2_tied"], tmp_path / "m")
    written = {k: v for k, v in json.loads((source / "config.json").read_text()).items() if "dtype" not in k}
    (source / "config.json").write_text(json.dumps(written | ({key: "bfloat16"} if key else {})))
    elsewhere = ("run/checkpoints/step_000001/hf/config.json", ".cache/x.json", "pytorch_model.bin.index.json")
    for name in ("additional_chat_templates/tool.jinja", *elsewhere):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("{}")
    tensors = load_file(source / "model.safetensors")
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    hf_weights.save_folder(source / "out", iter(tensors.items()), source, shapes=shapes, dtype=torch.float32)
    reread = AutoModelForCausalLM.from_pretrained(source / "out", dtype="auto").state_dict()
    assert all(torch.equal(reread[name], tensor) for name, tensor in tensors.items())
    assert (source / "out/additional_chat_templates/tool.jinja").is_file()
    assert not [name for name in (*elsewhere, "out.partial") if (source / "out" / name).exists()]


def test_a_tied_head_that_is_written_twice_is_accepted_only_if_equal(model_folders, tmp_path, alone):
    folder = model_folders["qwen2_tied"]
    embedding = load_file(f"{folder}/model.safetensors")["model.embed_tokens.weight"]
    load_changed(folder, tmp_path / "equal", alone, "lm_head.weight", embedding.clone())
    with pytest.raises(InputError, match=r"lm_head\.weight is one too many"):
        load_changed(folder, tmp_path / "other", alone, "lm_head.weight", embedding + 1)


def test_large_models_are_written_in_several_files_and_read_back(model_folders, tmp_path, alone, monkeypatch):
    monkeypatch.setattr(hf_weights, "MAX_FILE_BYTES", 40_000)
    folder = model_folders["qwen2_untied"]
    chunks, hf_config = chunks_of(folder, alone)
    save(tmp_path / "split", chunks, hf_config, alone, folder)
    assert len(list((tmp_path / "split").glob("*.safetensors"))) > 2
    with hf_weights.Reader(tmp_path / "split") as reader:
        for name, tensor in load_file(f"{folder}/model.safetensors").items():
            assert torch.equal(reader.read(name), tensor)


def test_a_file_is_written_as_safetensors_itself_writes_it_and_what_was_not_foretold_is_refused(
    model_folders, tmp_path, alone
):
    folder = model_folders["llama_linear_rope"]
    tensors = load_file(f"{folder}/model.safetensors")
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}

    def write(tensors: dict) -> None:
        hf_weights.save_folder(tmp_path / "out", iter(tensors.items()), folder, shapes=shapes, dtype=torch.float32)

    write(tensors)
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    first = next(iter(tensors))
    for wrong in (
        {**tensors, first: tensors[first].bfloat16()},
        {**tensors, first: tensors[first][:-1]},
        dict(reversed(tensors.items())),
    ):
        with pytest.raises(RuntimeError, match="was foretold|is foretold"):
            write(wrong)
    with pytest.raises(RuntimeError, match="was foretold and did not come"):
        write(dict(list(tensors.items())[:-1]))


@pytest.mark.parametrize("tp", [3, 4])
def test_a_tp_that_does_not_divide_the_heads_is_refused_with_those_that_do(model_folders, tp):
    with pytest.raises(InputError, match=r"parallel\.tp = .*must divide.*use one of 1, 2"):
        model.check_parallel(model.load_hf_config(model_folders["qwen2_tied"]), config.Parallel(tp=tp))


def test_unsupported_models_are_refused_by_name(model_folders, tmp_path):
    shutil.copytree(model_folders["llama_llama3_rope"], tmp_path / "m")
    path = tmp_path / "m/config.json"
    config = json.loads(path.read_text())
    for change, words in (
        ({"model_type": "gpt2"}, "gpt2"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "yarn"),
    ):
        path.write_text(json.dumps({**config, **change}))
        with pytest.raises(InputError, match=words):
            model.load_hf_config(str(tmp_path / "m"))
