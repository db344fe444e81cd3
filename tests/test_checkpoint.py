"""Save, restore, step: bit for bit; other layouts; and what a full disk or a half-written folder does.

Not covered here: resuming a whole run (test_trainer.py).
"""

import functools
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grpo_mcore import checkpoint, config, loss
from grpo_mcore.config import InputError
from grpo_mcore.parallel import topology
from tests.dist import spawn
from tests.test_policy import batch_of, connect, make_policy


def steps(policy, topo, seeds) -> dict[str, torch.Tensor]:
    """One update per seed; the whole weights after them."""
    for seed in seeds:
        b = batch_of(topo, max_tokens=100, seed=seed)
        for m, logprobs in zip(b.microbatches, policy.logprobs(b.microbatches), strict=True):
            m.old_logprobs_R = logprobs
        policy.update(b, functools.partial(loss.grpo, cfg=config.Loss()), lr=1e-2)
    return {name: tensor.clone() for name, tensor in policy.export()}


def save_then_go_on(folder: str, run_dir: str, tp: int, dtype: str):
    topo = connect(tp)
    policy = make_policy(folder, topo, dtype=dtype)
    saved = steps(policy, topo, [1, 2])
    checkpoint.save(run_dir, policy, checkpoint.Progress(2, 8, 1.5), keep=2)
    further = steps(policy, topo, [3])
    topology.disconnect()
    return saved, further


def restore_then_go_on(folder: str, run_dir: str, tp: int, dtype: str):
    topo = connect(tp)
    policy = make_policy(folder, topo, dtype=dtype)
    progress = checkpoint.restore(run_dir, policy)
    restored = {name: tensor.clone() for name, tensor in policy.export()}
    further = steps(policy, topo, [3])
    topology.disconnect()
    return restored, further, progress


@pytest.mark.parametrize(("tp_before", "tp_after", "dtype"), [(1, 1, "float32"), (1, 1, "bfloat16"), (2, 1, "float32")])
def test_restoring_and_stepping_equals_never_having_stopped(model_folders, tmp_path, tp_before, tp_after, dtype):
    folder = model_folders["qwen2_tied"]
    (saved, further), *_ = spawn(save_then_go_on, tp_before, folder, str(tmp_path), tp_before, dtype)
    ranks = spawn(restore_then_go_on, tp_after, folder, str(tmp_path), tp_after, dtype)
    for restored, resumed, progress in ranks:
        assert progress == checkpoint.Progress(2, 8, 1.5)
        for name in saved:
            assert torch.equal(saved[name], restored[name]), name
            assert not torch.equal(saved[name], further[name]), name
            if tp_before == tp_after:
                assert torch.equal(further[name], resumed[name]), name
            else:  # another order of summation, then one step of Adam: sign flips of gradients near 0 cost up to 2 lr
                assert (further[name] - resumed[name]).abs().mean() < 1e-4, name


@pytest.fixture
def policy(model_folders):
    topo = connect(1)
    policy = make_policy(model_folders["qwen2_tied"], topo)
    steps(policy, topo, [1])  # before it the optimizer has no state to save
    yield policy
    topology.disconnect()


def test_a_half_written_checkpoint_is_passed_over_and_the_newest_are_kept(policy, tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, policy, checkpoint.Progress(step), keep=2)
    (tmp_path / "checkpoints/step_000004.partial").mkdir()
    assert checkpoint.latest(tmp_path).name == "step_000003"
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_000002", "step_000003", "step_000004.partial"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB, with room for a few checkpoints of the tiny model."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk]).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", disk], check=True)


def fill(disk: Path, leave: int) -> None:
    (disk / "filler").write_bytes(b"x" * (shutil.disk_usage(disk).free - leave))


def test_a_full_disk_is_one_clear_error_and_the_checkpoint_before_it_stays(policy, small_disk):
    checkpoint.save(small_disk, policy, checkpoint.Progress(1), keep=3)
    fill(small_disk, leave=1_000_000)
    with pytest.raises(InputError, match=r"step_000002.*the disk has .* MB free.*Remedy: make room"):
        checkpoint.save(small_disk, policy, checkpoint.Progress(2), keep=3)
    assert [p.name for p in (small_disk / "checkpoints").iterdir()] == ["step_000001"]
    assert checkpoint.restore(small_disk, policy).step == 1


def test_a_checkpoint_that_cannot_be_written_leaves_nothing_behind(policy, small_disk, monkeypatch):
    # The disk fills up after it was measured: Megatron's writers meet the error.
    monkeypatch.setattr(checkpoint, "_no_room", lambda partial, state: None)
    fill(small_disk, leave=100_000)
    with pytest.raises(InputError, match="could not be written"):
        checkpoint.save(small_disk, policy, checkpoint.Progress(1), keep=3)
    assert list((small_disk / "checkpoints").iterdir()) == []


def test_from_hf_and_to_hf_are_byte_identical(model_folders, tmp_path):
    topo = connect(1)
    folder = Path(model_folders["qwen2_untied"])
    checkpoint.from_hf(folder, tmp_path / "megatron", topo)
    checkpoint.to_hf(tmp_path / "megatron", tmp_path / "hf", topo)
    topology.disconnect()
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "hf/model.safetensors")
    assert before.keys() == after.keys() and all(before[n].numpy().tobytes() == after[n].numpy().tobytes() for n in before)
    with pytest.raises(InputError, match="has no hf/ folder"):
        checkpoint.to_hf(tmp_path / "hf", tmp_path / "x", topo)


def test_the_size_asked_of_the_disk_is_the_size_written(policy, tmp_path):
    state = {**checkpoint._sharded(policy, is_loading=True), "rng": torch.get_rng_state()}
    checkpoint.save(tmp_path, policy, checkpoint.Progress(1), keep=1)
    written = sum(f.stat().st_size for f in checkpoint.latest(tmp_path).glob("*.distcp"))
    assert written == pytest.approx(checkpoint.num_bytes(state), rel=0.2)  # 20%: the files' own headers, in a model of 0.5 MB
