"""Checkpoints: what is restored, what is refused, what is kept, and the disk that is full.

Not covered here: whole runs that are killed and go on (test_trainer.py, benchmarks/kill_resume.py).
"""

import dataclasses
import itertools
import json
import math
import os
import random
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from safetensors.torch import load_file

from grpo_mcore.checkpoint import checkpoint, convert, optimizer_state
from grpo_mcore.checkpoint.checkpoint import AttestationError, Checkpoints, Progress, folder_of, ranked
from grpo_mcore.config import config
from grpo_mcore.config.config import InputError
from grpo_mcore.parallel import topology
from grpo_mcore.policy.policy import Policy
from tests.dist import spawn
from tests.policy.test_policy import batch_of, connect, decays, make_policy, on_policy_update


def steps(policy, topo, seeds) -> dict[str, torch.Tensor]:
    """One update per seed; the whole weights after them, on the driver."""
    for seed in seeds:
        on_policy_update(policy, batch_of(topo, max_tokens=100, seed=seed), lr=1e-2)
    return {name: tensor.clone() for name, tensor in policy.export()}


def settings(**kwargs) -> config.Checkpoint:
    return config.Checkpoint(timeout_s=60, **kwargs)


def save_then_go_on(folder: str, run_dir: str, axes: dict, dtype: str):
    topo = connect(**axes)
    policy = make_policy(folder, topo, dtype=dtype)
    saved = steps(policy, topo, [1, 2])
    checkpoints = Checkpoints(run_dir, policy, settings())
    generators = [torch.rand(3), random.random()]
    checkpoints.save(Progress(2, 8, 1.5))
    further = steps(policy, topo, [3])  # while it is being written
    checkpoints.wait()
    generators += [torch.rand(3), random.random()]
    topology.disconnect()
    return saved, further, generators[2:]


def restore_then_go_on(folder: str, run_dir: str, axes: dict, dtype: str):
    topo = connect(**axes)
    policy = make_policy(folder, topo, dtype=dtype)
    progress = Checkpoints(run_dir, policy, settings()).restore()
    generators = [torch.rand(3), random.random()]
    restored = {name: tensor.clone() for name, tensor in policy.export()}
    further = steps(policy, topo, [3])
    topology.disconnect()
    return restored, further, progress, generators


@pytest.mark.parametrize(
    ("before", "after", "dtype"),
    [
        pytest.param((1, {}), (1, {}), "float32", marks=pytest.mark.slow),
        ((1, {}), (1, {}), "bfloat16"),
        ((4, {"tp": 2}), (4, {"tp": 2}), "float32"),  # tp 2 x dp 2
        ((4, {"tp": 2}), (2, {"pp": 2}), "float32"),
        pytest.param(
            (2, {"pp": 2, "virtual_pp": 2}),
            (2, {"tp": 2, "sequence_parallel": True}),
            "bfloat16",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
            (2, {"cp": 2}),
            "float32",
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_restoring_and_stepping_equals_never_having_stopped(model_folders, tmp_path, before, after, dtype):
    folder = model_folders["qwen2_deep"]
    ranks_before = spawn(save_then_go_on, before[0], folder, str(tmp_path), before[1], dtype)
    ranks_after = spawn(restore_then_go_on, after[0], folder, str(tmp_path), after[1], dtype)
    saved, further, _ = ranks_before[0]
    restored, resumed, progress, _ = ranks_after[0]
    assert progress == Progress(2, 8, 1.5)
    for name in saved:
        assert torch.equal(saved[name], restored[name]), name
        assert not torch.equal(saved[name], further[name]), name
        if before == after:
            assert torch.equal(further[name], resumed[name]), name
        else:  # another order of summation, then one step of Adam: sign flips of gradients near 0 cost up to 2 lr
            assert (further[name] - resumed[name]).abs().float().mean() < (1e-4 if dtype == "float32" else 2e-3), name
    if before == after:  # every rank's generators go on where they were
        for (_, _, expected), (*_, seen) in zip(ranks_before, ranks_after, strict=True):
            assert torch.equal(expected[0], seen[0]) and expected[1] == seen[1]
    # What any layout wrote, the converter reads.
    convert.to_hf(checkpoint.published(tmp_path)[0], tmp_path / "hf")
    exported = load_file(tmp_path / "hf/model.safetensors")
    assert exported.keys() == saved.keys() and all(torch.equal(exported[name], saved[name]) for name in saved)


@pytest.fixture
def policy(model_folders):
    topo = connect()
    policy = make_policy(model_folders["qwen2_tied"], topo)
    yield policy
    topology.disconnect()


def save(policy, run_dir, step: int, **kwargs) -> None:
    steps(policy, policy.topology, [step])
    checkpoints = Checkpoints(run_dir, policy, settings(**kwargs))
    checkpoints.save(Progress(step))
    checkpoints.wait()


def test_a_run_may_begin_from_another_runs_checkpoint_with_its_optimizer_at_step_0(model_folders, policy, tmp_path):
    save(policy, tmp_path / "first", 2)
    start = tmp_path / "first/checkpoints/step_000002"
    further = steps(policy, policy.topology, [3])

    second = make_policy(model_folders["qwen2_tied"], policy.topology)
    assert Checkpoints(tmp_path / "second", second, settings(start_from=str(start))).restore() == Progress()
    resumed = steps(second, policy.topology, [3])
    assert all(torch.equal(further[name], resumed[name]) for name in further)

    convert.to_hf(start, tmp_path / "hf")  # the weights alone, with moments of 0
    fresh = steps(make_policy(tmp_path / "hf", policy.topology), policy.topology, [3])
    assert not all(torch.equal(further[name], fresh[name]) for name in further)

    with pytest.raises(InputError, match="checkpoint.start_from = .*: there is no checkpoint"):
        Checkpoints(tmp_path / "third", second, settings(start_from=str(tmp_path / "hf"))).restore()
    # A run's own checkpoint comes first.
    save(second, tmp_path / "second", 1)
    assert Checkpoints(tmp_path / "second", second, settings(start_from=str(start))).restore().step == 1


def test_the_optimizers_settings_are_the_configurations_and_not_the_checkpoints(model_folders, policy, tmp_path):
    save(policy, tmp_path, 1)
    step = policy.optimizer.param_groups[0]["step"]
    changed = config.Optimizer(lr=3e-4, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.3, decay="matrices")
    other = make_policy(model_folders["qwen2_tied"], policy.topology, optimizer=changed)
    assert Checkpoints(tmp_path, other, settings()).restore() == Progress(1)
    for group in other.optimizer.param_groups:
        assert (group["betas"], group["eps"], group["step"]) == ((0.8, 0.95), 1e-6, step)
    assert decays(other) == {1: 0.0, 2: 0.3}

    # One update, by hand: the moments are the checkpoint's, all else is the configuration's.
    main, state = other.optimizer.param_groups[0]["params"][0], other.optimizer.chained_optimizers[0].optimizer.state
    weight, m, v = (x.detach().double() for x in (main, state[main]["exp_avg"], state[main]["exp_avg_sq"]))
    on_policy_update(other, batch_of(policy.topology, max_tokens=100, seed=5), lr=3e-4)
    gradient = main.grad.double()
    m, v = 0.8 * m + 0.2 * gradient, 0.95 * v + 0.05 * gradient**2
    adam = m / (1 - 0.8 ** (step + 1)) / ((v / (1 - 0.95 ** (step + 1))).sqrt() + 1e-6)
    expected = weight * (1 - 3e-4 * other.optimizer.param_groups[0]["weight_decay"]) - 3e-4 * adam
    torch.testing.assert_close(main.detach().double(), expected, rtol=1e-6, atol=1e-7)


def names(run_dir: Path) -> list[str]:
    return sorted(p.name for p in (run_dir / "checkpoints").iterdir())


def test_a_save_is_published_when_it_is_written_and_not_before(policy, tmp_path):
    checkpoints = Checkpoints(tmp_path, policy, settings())
    saved = steps(policy, policy.topology, [1])
    checkpoints.save(Progress(1))
    assert names(tmp_path) == ["step_000001.partial"] and checkpoints.newest_step == 1
    later = steps(policy, policy.topology, [2])
    checkpoints.wait()
    assert names(tmp_path) == ["step_000001"]
    Checkpoints(tmp_path, policy, settings()).restore()
    for name, tensor in policy.export():
        assert torch.equal(tensor, saved[name]) and not torch.equal(tensor, later[name]), name


def test_what_was_written_is_read_back_beside_the_training(policy, tmp_path, monkeypatch):
    checkpoints, honest, go_on = Checkpoints(tmp_path, policy, settings()), checkpoint.file_digest, threading.Event()
    monkeypatch.setattr(checkpoint, "file_digest", lambda path: go_on.wait(30) and honest(path))
    steps(policy, policy.topology, [1])
    checkpoints.save(Progress(1))
    end = time.monotonic() + 60
    while not (tmp_path / "checkpoints/step_000001.partial/run.json").exists() and time.monotonic() < end:
        checkpoints.poll()
        time.sleep(0.01)
    checkpoints.poll()  # does not wait
    assert names(tmp_path) == ["step_000001.partial"]
    go_on.set()
    checkpoints.wait()
    assert names(tmp_path) == ["step_000001"]


def test_the_newest_are_kept_and_the_best(policy, tmp_path):
    rewards = {1: 0.5, 2: 0.9, 3: 0.7, 4: 0.1, 5: 0.2}
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": s, "reward/mean": r}) + "\n" for s, r in rewards.items())
    )
    for step in rewards:
        save(policy, tmp_path, step, keep=1, keep_best=2)
    # 4 was the newest when 5 came: neither is among the two best, 2 and 3.
    assert names(tmp_path) == ["step_000002", "step_000003", "step_000005"]


def test_a_nan_is_never_the_best(tmp_path):
    for values in itertools.permutations([0.5, math.nan, 0.9, 0.7]):
        rows = [{"step": step, "reward/mean": value} for step, value in enumerate(values, 1)]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for step in range(1, 5):
            folder = folder_of(tmp_path, step)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "attest.json").write_text("{}")
            (folder / "run.json").write_text(json.dumps({"step": step, "cursor": 0, "seconds": 0.0}))
        assert [value for _, value in ranked(tmp_path, "reward/mean")] == [0.9, 0.7, 0.5]


def damage(path: Path, at: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(data)


def weights_file(folder: Path) -> Path:
    return max(folder.glob("*.distcp"), key=lambda p: p.stat().st_size)


def test_a_damaged_and_a_half_written_checkpoint_are_named_and_the_one_before_is_used(policy, tmp_path, capsys):
    for step in (1, 2, 3, 4):
        save(policy, tmp_path, step, keep=4)
    damage(weights_file(tmp_path / "checkpoints/step_000004"))
    (tmp_path / "checkpoints/step_000003/.metadata").unlink()
    (tmp_path / "checkpoints/step_000005.partial").mkdir()
    assert Checkpoints(tmp_path, policy, settings()).restore().step == 2
    said = capsys.readouterr().out
    assert "step_000004 is passed over: its file" in said and "is not what was written" in said
    assert "step_000003 is passed over: its file .metadata is missing" in said
    assert "step_000005.partial is half-written" in said


def test_checkpoints_that_are_all_damaged_are_an_error_and_not_a_fresh_start(policy, tmp_path):
    save(policy, tmp_path, 1)
    damage(tmp_path / "checkpoints/step_000001/run.json", at=0.9)
    with pytest.raises(InputError, match="each of them is damaged.*Remedy: remove its checkpoints/"):
        Checkpoints(tmp_path, policy, settings()).restore()


@pytest.mark.parametrize("at", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_one_flipped_bit_of_the_weights_on_their_way_to_the_disk_is_caught(policy, tmp_path, monkeypatch, at):
    steps(policy, policy.topology, [1])
    checkpoints = Checkpoints(tmp_path, policy, settings())
    honest = dist_checkpointing.save

    def corrupting(state, folder, **kwargs):
        """Of one weight, while it is being planned what is written."""
        parameters = list(policy.chunks[0].parameters())
        bits = parameters[int(len(parameters) * at)].data.view(torch.int32).view(-1)
        bits[len(bits) // 2] ^= 1
        return honest(state, folder, **kwargs)

    monkeypatch.setattr(dist_checkpointing, "save", corrupting)
    checkpoints.save(Progress(1))
    with pytest.raises(
        AttestationError, match="step_000001 is not published: what was written differs from the policy in"
    ):
        checkpoints.wait()
    assert names(tmp_path) == ["step_000001.partial"]


def test_a_save_that_writes_the_weights_of_the_one_before_is_caught(policy, tmp_path, monkeypatch):
    save(policy, tmp_path, 1)
    first = {name: p.detach().clone() for name, p in policy.chunks[0].named_parameters()}
    steps(policy, policy.topology, [2])
    checkpoints = Checkpoints(tmp_path, policy, settings())
    honest = dist_checkpointing.save

    def stale(state, folder, **kwargs):
        """What a cache of the first save's tensors does."""
        with torch.no_grad():
            for name, p in policy.chunks[0].named_parameters():
                p.copy_(first[name])
        return honest(state, folder, **kwargs)

    monkeypatch.setattr(dist_checkpointing, "save", stale)
    checkpoints.save(Progress(2))
    with pytest.raises(
        AttestationError, match="holds the weights of .*step_000001, although the policy has moved since"
    ):
        checkpoints.wait()
    assert names(tmp_path) == ["step_000001", "step_000002.partial"]


def test_a_save_that_never_ends_is_a_time_out(policy, tmp_path, monkeypatch):
    steps(policy, policy.topology, [1])
    checkpoints = Checkpoints(tmp_path, policy, config.Checkpoint(timeout_s=0.2))
    monkeypatch.setattr(checkpoint.AsyncCallsQueue, "maybe_finalize_async_calls", lambda self, blocking: [])
    checkpoints.save(Progress(1))
    with pytest.raises(TimeoutError, match="step_000001 was still being written after 0 s"):
        checkpoints.wait()
    monkeypatch.undo()
    # Its result would be taken for the next test's save: Megatron has one queue a process.
    checkpoints._writing.wait(30)


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
    save(policy, small_disk, 1)
    fill(small_disk, leave=1_000_000)
    with pytest.raises(InputError, match=r"step_000002.*the disk has .* MB free.*Remedy: make room"):
        save(policy, small_disk, 2)
    assert names(small_disk) == ["step_000001"]
    assert Checkpoints(small_disk, policy, settings()).restore().step == 1


def test_a_checkpoint_that_cannot_be_written_leaves_nothing_behind(policy, small_disk, monkeypatch):
    # The disk fills up after it was measured: Megatron's writers meet the error.
    monkeypatch.setattr(checkpoint, "_no_room", lambda partial, needed: None)
    fill(small_disk, leave=100_000)
    with pytest.raises(InputError, match="could not be written"):
        save(policy, small_disk, 1)
    assert names(small_disk) == []


def test_scales_of_delayed_fp8_may_be_unpickled_while_a_checkpoint_is_loaded_and_at_no_other_time():
    engine = pytest.importorskip("transformer_engine.pytorch._extra_state")
    with checkpoint._trusted_pickles():
        assert engine.unsafe_pickle_extra_state_enabled()
    assert not engine.unsafe_pickle_extra_state_enabled()


def test_the_size_asked_of_the_disk_is_the_size_written(policy, tmp_path):
    save(policy, tmp_path, 1)
    weights = checkpoint._weights(policy)
    state = {**weights, "optimizer": optimizer_state.sharded(policy, weights)}
    written = sum(f.stat().st_size for f in checkpoint.published(tmp_path)[0].glob("*.distcp"))
    # 20%: the files' own headers, in a model of 0.5 MB.
    assert written == pytest.approx(checkpoint.num_bytes(state, policy.topology), rel=0.2)


@pytest.mark.gpu
def test_delayed_fp8_goes_on_with_the_scales_that_were_saved(model_folders, tmp_path):
    topo = topology.connect(config.Parallel(), device=torch.device("cuda", 0), timeout_s=60, seed=1)
    precision = config.Precision(fp8="delayed", fp8_amax_history=4)
    kwargs = dict(precision=precision, temperature=0.7, optimizer=config.Optimizer(lr=1e-3))
    policy = Policy(model_folders["qwen3"], topo, **kwargs)
    b = batch_of(topo, max_tokens=64, precision=precision)
    for _ in range(3):
        on_policy_update(policy, b)
    checkpoints = Checkpoints(tmp_path, policy, settings())
    checkpoints.save(Progress(3))
    checkpoints.wait()
    resumed = Policy(model_folders["qwen3"], topo, **kwargs)
    assert Checkpoints(tmp_path, resumed, settings()).restore().step == 3
    assert all(map(torch.equal, policy.logprobs(b.microbatches), resumed.logprobs(b.microbatches)))
    topology.disconnect()


def test_progress_comes_back_also_of_a_version_that_left_no_prompt_out(tmp_path):
    progress = checkpoint.Progress(3, 24, 1.5, [[1, 7]])
    (tmp_path / checkpoint.RUN).write_text(json.dumps(dataclasses.asdict(progress) | {"layout": {}}))
    assert checkpoint.progress_of(tmp_path) == progress
    (tmp_path / checkpoint.RUN).write_text('{"step": 3, "cursor": 24, "seconds": 1.5, "layout": {}}')
    assert checkpoint.progress_of(tmp_path) == checkpoint.Progress(3, 24, 1.5, [])
