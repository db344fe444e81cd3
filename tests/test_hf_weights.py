"""Hugging Face -> Megatron -> Hugging Face, bit for bit, on one and two tp ranks; and what is refused.

Not covered here: that the model computes the same (test_policy.py); the program around it (test_launch.py).
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from grpo_mcore import hf_weights, model
from grpo_mcore.config import InputError
from grpo_mcore.parallel import topology
from tests import models
from tests.dist import spawn


def round_trip(folders: dict[str, str], tp: int, out: str) -> dict[str, list]:
    topo = topology.connect(tp=tp, device=torch.device("cpu"), timeout_s=60, seed=1)
    described = {}
    for kind, folder in folders.items():
        hf_config = model.load_hf_config(folder)
        with hf_weights.Reader(folder) as reader:
            backbone = model.build(hf_config, tp=tp, params_dtype=reader.dtype(), device=topo.device)
        hf_weights.load(backbone, hf_config, folder, topo)
        described[kind] = hf_weights.shapes(backbone, hf_config, tp)
        hf_weights.save_folder(f"{out}/{kind}", hf_weights.export(backbone, hf_config, topo), folder, write=topo.is_driver)
    topology.disconnect()
    return described


@pytest.mark.parametrize("tp", [1, 2])
def test_round_trip_is_bit_exact_in_every_family(model_folders, tmp_path, tp):
    bf16 = models.make("qwen3", tmp_path / "bf16", torch.bfloat16)
    folders = {**model_folders, "qwen3_bf16": bf16}
    described, *_ = spawn(round_trip, tp, folders, tp, str(tmp_path))
    for kind, folder in folders.items():
        before, after = load_file(f"{folder}/model.safetensors"), load_file(f"{tmp_path}/{kind}/model.safetensors")
        assert set(before) == set(after)
        for name, tensor in before.items():
            assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), (kind, name)
        assert dict(described[kind]) == {name: tuple(t.shape) for name, t in before.items()}
        assert json.load(open(f"{tmp_path}/{kind}/config.json")) == json.load(open(f"{folder}/config.json"))


@pytest.fixture
def alone():
    yield topology.connect(tp=1, device=torch.device("cpu"), timeout_s=60, seed=1)
    topology.disconnect()


def load_changed(folder: str, tmp_path, alone, change) -> None:
    shutil.copytree(folder, tmp_path / "changed")
    tensors = load_file(tmp_path / "changed/model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "changed/model.safetensors", metadata={"format": "pt"})
    hf_config = model.load_hf_config(str(tmp_path / "changed"))
    backbone = model.build(hf_config, tp=1, params_dtype=torch.float32, device=alone.device)
    hf_weights.load(backbone, hf_config, tmp_path / "changed", alone)


def test_a_missing_tensor_is_named(model_folders, tmp_path, alone):
    with pytest.raises(InputError, match=r"model\.layers\.1\.self_attn\.k_proj\.bias is missing"):
        load_changed(model_folders["qwen2_tied"], tmp_path, alone, lambda t: t.pop("model.layers.1.self_attn.k_proj.bias"))


def test_an_extra_tensor_is_named(model_folders, tmp_path, alone):
    with pytest.raises(InputError, match=r"model\.layers\.0\.self_attn\.q_norm\.weight is one too many"):
        load_changed(model_folders["qwen2_tied"], tmp_path, alone, lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}))


def test_a_misshapen_tensor_is_named(model_folders, tmp_path, alone):
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.down_proj\.weight"):
        load_changed(model_folders["qwen2_tied"], tmp_path, alone, lambda t: t.update({"model.layers.0.mlp.down_proj.weight": torch.ones(64, 95)}))


def test_a_tied_head_that_is_written_twice_is_accepted_only_if_equal(model_folders, tmp_path, alone):
    load_changed(model_folders["qwen2_tied"], tmp_path, alone, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    shutil.rmtree(tmp_path / "changed")
    with pytest.raises(InputError, match=r"lm_head\.weight is one too many"):
        load_changed(model_folders["qwen2_tied"], tmp_path, alone, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))


def test_large_models_are_written_in_several_files_and_read_back(model_folders, tmp_path, alone, monkeypatch):
    monkeypatch.setattr(hf_weights, "MAX_FILE_BYTES", 40_000)
    folder = model_folders["qwen2_untied"]
    hf_config = model.load_hf_config(folder)
    backbone = model.build(hf_config, tp=1, params_dtype=torch.float32, device=alone.device)
    hf_weights.load(backbone, hf_config, folder, alone)
    hf_weights.save_folder(tmp_path / "split", hf_weights.export(backbone, hf_config, alone), folder)
    assert len(list((tmp_path / "split").glob("*.safetensors"))) > 2
    with hf_weights.Reader(tmp_path / "split") as reader:
        for name, tensor in load_file(f"{folder}/model.safetensors").items():
            assert torch.equal(reader.read(name), tensor)


@pytest.mark.parametrize("tp", [3, 4])
def test_a_tp_that_does_not_divide_the_heads_is_refused_with_those_that_do(model_folders, tp):
    with pytest.raises(InputError, match=r"parallel\.tp = .*must divide.*use one of 1, 2"):
        model.check_tp(model.load_hf_config(model_folders["qwen2_tied"]), tp)


def test_unsupported_models_are_refused_by_name(model_folders, tmp_path):
    shutil.copytree(model_folders["llama_llama3_rope"], tmp_path / "m")
    path = tmp_path / "m/config.json"
    config = json.loads(path.read_text())
    for change, words in (({"model_type": "gpt2"}, "gpt2"), ({"attention_bias": True}, "attention_bias"),
                          ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "yarn")):
        path.write_text(json.dumps({**config, **change}))
        with pytest.raises(InputError, match=words):
            model.load_hf_config(str(tmp_path / "m"))
    with pytest.raises(InputError, match="neither a folder nor a hub name"):
        hf_weights.local_folder(str(tmp_path / "absent"))
