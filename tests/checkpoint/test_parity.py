"""The proof of an export: what it accepts, and that a wrong weight or a wrong reading of it is named.

Not covered here: sizes of real models.
"""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from grpo_mcore.checkpoint import checkpoint, convert, parity
from grpo_mcore.config import config
from grpo_mcore.config.config import InputError
from grpo_mcore.parallel import topology
from tests.checkpoint.test_checkpoint import steps
from tests.dist import spawn
from tests.policy.test_policy import connect, make_policy

KIND = "qwen2_tied"  # 91 tokens: tp 2 pads them


def save_with_tp2(folder: str, run_dir: str) -> None:
    topo = connect(tp=2)
    policy = make_policy(folder, topo)
    steps(policy, topo, [1])  # after which the padding must still be 0
    checkpoints = checkpoint.Checkpoints(run_dir, policy, config.Checkpoint(asynchronous=False))
    checkpoints.save(checkpoint.Progress(1, 4, 1.0))
    checkpoints.wait()
    topology.disconnect()


@pytest.fixture(scope="module")
def exported(model_folders, tmp_path_factory) -> tuple[Path, Path]:
    """(checkpoint, its export)"""
    root = tmp_path_factory.mktemp("parity")
    topo = connect()
    convert.from_hf(model_folders[KIND], root / "checkpoint", topo)
    topology.disconnect()
    convert.to_hf(root / "checkpoint", root / "hf")
    return root / "checkpoint", root / "hf"


def change(hf: Path, name: str, index: int) -> None:
    tensors = load_file(hf / "model.safetensors")
    tensors[name].view(-1)[index] += 1e-6
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})


def test_an_export_is_proved_whatever_layout_wrote_the_checkpoint(model_folders, tmp_path, exported):
    proof = parity.prove(*exported, tmp_path / "proof.json")
    assert json.loads((tmp_path / "proof.json").read_text()) == proof
    assert proof["tokens"] == 192 and proof["logprob_abs_max_error"] < 1e-4 and proof["mean_logprob"] < -1

    spawn(save_with_tp2, 2, model_folders[KIND], str(tmp_path / "run"))
    saved = tmp_path / "run/checkpoints/step_000001"
    convert.to_hf(saved, tmp_path / "hf")
    # One a rank, where there was one in all.
    assert parity.compare_weights(saved, tmp_path / "hf") > proof["equal_parts"]
    with pytest.raises(parity.ParityError, match="is not what the policy held"):  # before the step
        parity.compare_weights(saved, exported[1])


@pytest.mark.parametrize(
    "name, index",
    [
        ("model.layers.1.self_attn.k_proj.weight", 5),
        ("model.layers.0.mlp.up_proj.weight", -1),
        ("model.embed_tokens.weight", 90 * 128),
        ("model.norm.weight", 0),
    ],
)
def test_a_weight_that_was_not_trained_so_is_named(exported, tmp_path, name, index):
    shutil.copytree(exported[1], tmp_path / "hf")
    change(tmp_path / "hf", name, index)
    with pytest.raises(parity.ParityError, match=rf"{name}.* is not what the policy held when .*checkpoint was saved"):
        parity.compare_weights(exported[0], tmp_path / "hf")
    assert parity.folder_digest(tmp_path / "hf") != parity.folder_digest(exported[1])


@pytest.mark.parametrize(("said", "refused"), [("float32", False), (None, False), ("bfloat16", True)])
def test_an_export_whose_config_says_another_dtype_is_refused(exported, tmp_path, said, refused):
    shutil.copytree(exported[1], tmp_path / "hf")
    written = json.loads((tmp_path / "hf/config.json").read_text())
    assert written["dtype"] == "float32"
    (tmp_path / "hf/config.json").write_text(json.dumps(written | {"dtype": said}))
    if not refused:
        assert parity.compare_weights(exported[0], tmp_path / "hf")
        return
    with pytest.raises(parity.ParityError, match=r"config.json says torch.bfloat16, and its tensors are torch.float32"):
        parity.compare_weights(exported[0], tmp_path / "hf")


def test_a_checkpoint_that_attests_only_a_part_proves_nothing(exported, tmp_path):
    shutil.copytree(exported[0], tmp_path / "checkpoint")
    attest = json.loads((tmp_path / "checkpoint/attest.json").read_text())
    name = next(name for name in attest["weights"] if "linear_fc1.weight" in name)
    del attest["weights"][name]
    (tmp_path / "checkpoint/attest.json").write_text(json.dumps(attest))
    with pytest.raises(
        parity.ParityError,
        match="attests 12288 of the 24576 elements of model.layers.0.mlp.gate_proj.weight, "
        "model.layers.0.mlp.up_proj.weight",
    ):
        parity.compare_weights(tmp_path / "checkpoint", exported[1])
    with pytest.raises(InputError, match="has no attest.json"):
        parity.compare_weights(exported[1], exported[1])


def test_a_model_that_computes_something_else_with_the_same_weights_is_refused(exported, monkeypatch):
    """The trainer's side scores other tokens than Hugging Face's: their log-probs differ, and the proof must see it."""
    score = parity.policy_logprobs
    monkeypatch.setattr(parity, "policy_logprobs", lambda folder, sequences: score(folder, sequences[::-1]))
    with pytest.raises(
        parity.ParityError, match="log-probs of the same tokens by transformers and by the trainer differ by"
    ):
        parity.prove(*exported)
