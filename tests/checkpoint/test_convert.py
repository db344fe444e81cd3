"""Hugging Face -> checkpoint -> Hugging Face, what it holds in memory on the way, and that the trainer's model reads
it.

Not covered here: checkpoints of other layouts (test_checkpoint.py); the program around it (test_launch.py).
"""

import json
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from safetensors.torch import load_file, save_file

from grpo_mcore.checkpoint import checkpoint, convert
from grpo_mcore.config import config
from grpo_mcore.config.config import InputError
from grpo_mcore.parallel import topology
from tests import models
from tests.dist import spawn
from tests.policy.test_policy import connect, make_policy


@pytest.fixture
def alone():
    yield connect()
    topology.disconnect()


@pytest.mark.parametrize("kind", models.KINDS)
def test_from_hf_and_to_hf_are_byte_identical(model_folders, tmp_path, alone, kind):
    folder = Path(model_folders[kind])
    convert.from_hf(folder, tmp_path / "megatron", alone)
    convert.to_hf(tmp_path / "megatron", tmp_path / "hf")
    assert (tmp_path / "hf/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="has no hf/ folder"):
        convert.to_hf(tmp_path / "hf", tmp_path / "x")


@pytest.mark.parametrize("kind", models.KINDS)
def test_the_trainers_model_reads_what_was_converted(model_folders, tmp_path, alone, kind):
    convert.from_hf(model_folders[kind], tmp_path / "megatron", alone)
    policy = make_policy(model_folders[kind], alone)
    with torch.no_grad():
        for p in policy.chunks[0].parameters():
            p.zero_()
    state = dist_checkpointing.load(checkpoint._weights(policy), tmp_path / "megatron")
    policy.chunks[0].load_state_dict(state["model0"], strict=False)
    original = load_file(f"{model_folders[kind]}/model.safetensors")
    assert all(torch.equal(original[name], tensor) for name, tensor in policy.export())


@pytest.fixture
def written(model_folders, tmp_path, alone) -> Path:
    convert.from_hf(model_folders["qwen2_tied"], tmp_path / "megatron", alone)
    return tmp_path / "megatron"


DAMAGE = {
    "gone": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "another": lambda path: path.write_bytes(b"{}"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", [".metadata", "*.distcp", "attest.json", "hf/config.json"])
def test_a_damaged_checkpoint_is_one_line_and_leaves_no_folder(written, tmp_path, name, damage):
    files = [path.name for path in written.glob(name)] if "*" in name else [name]
    assert files  # of weights: two in megatron-core 0.16, one in 0.19
    for file in files:
        damaged = Path(shutil.copytree(written, tmp_path / file.replace("/", "_")))
        DAMAGE[damage](damaged / file)
        with pytest.raises(InputError):
            convert.to_hf(damaged, tmp_path / "hf")
        assert not (tmp_path / "hf").exists()


def test_weights_that_are_not_those_that_were_saved_are_not_exported(written, tmp_path):
    path = written / "__0_0.distcp"
    contents = bytearray(path.read_bytes())
    contents[100_000] ^= 0x40
    path.write_bytes(contents)
    with pytest.raises(InputError, match="is damaged .* is not what was saved"):
        convert.to_hf(written, tmp_path / "hf")


def test_weights_that_nothing_attests_are_not_exported(written, tmp_path):
    attested = json.loads((written / "attest.json").read_text())
    last = [name for name in attested["weights"] if name.startswith("embedding")]
    assert last
    for name in last:
        del attested["weights"][name]
    (written / "attest.json").write_text(json.dumps(attested))
    with pytest.raises(InputError, match="attest.json lacks embedding.word_embeddings.weight"):
        convert.to_hf(written, tmp_path / "hf")


def test_a_tensor_of_a_dtype_that_is_not_trained_is_refused_before_it_is_read(model_folders, tmp_path, alone):
    folder = shutil.copytree(model_folders["qwen2_tied"], tmp_path / "m")
    tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match="is of F8_E4M3, and weights are of BF16, F32, F16"):
        convert.from_hf(folder, tmp_path / "megatron", alone)


def anonymous_bytes() -> int:
    """Memory of one's own, without the pages of mapped files; its peak is not kept by Linux, so it is sampled."""
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024


def peak_of(direction: str, source: Path, out: Path) -> int:
    """Bytes beyond what was there before."""
    topo = topology.connect(config.Parallel(), device=torch.device("cpu"), timeout_s=60, seed=0)
    peak, done, before = [0], threading.Event(), anonymous_bytes()

    def sample() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], anonymous_bytes())
            time.sleep(0.001)

    thread = threading.Thread(target=sample)
    thread.start()
    convert.from_hf(source, out, topo) if direction == "from_hf" else convert.to_hf(source, out)
    done.set()
    thread.join()
    return peak[0] - before


def test_converting_holds_the_model_once_on_the_way_in_and_one_tensor_on_the_way_out(tmp_path):
    import transformers as tf

    torch.manual_seed(0)
    # 12 layers of 12.8 MB and two vocabulary matrices of 16.4 MB: 187 MB
    size = dict(
        vocab_size=8000,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=256,
    )
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**size, tie_word_embeddings=False))
    model_bytes, layer_bytes = (sum(p.numel() * 4 for p in m.parameters()) for m in (model, model.model.layers[0]))
    model.save_pretrained(tmp_path / "hf")

    def peak(source: str, out: str, direction: str) -> int:
        return spawn(peak_of, 1, direction, tmp_path / source, tmp_path / out)[0]

    largest = max(layer_bytes, 8000 * 512 * 4)
    assert peak("hf", "megatron", "from_hf") < model_bytes + 2 * largest
    # The part read, what it is read from, the bytes that are written, and a little.
    assert peak("megatron", "again", "to_hf") < 4 * largest
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "hf/model.safetensors").read_bytes()
