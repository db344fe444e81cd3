"""Atomic save and restore: weights, optimizer, RNG, prompt cursor, step.

RUN/checkpoints/step_000010/ is written under another name and renamed when it is whole, so a folder with that name is a
good one. It holds Megatron's distributed checkpoint, run.json (step, cursor, seconds) and hf/ (the model's config and
tokenizer), which is all that launch/convert.py needs.
"""

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch.distributed.checkpoint.api import CheckpointException

from grpo_mcore import hf_weights, model
from grpo_mcore.config import InputError
from grpo_mcore.parallel import collectives
from grpo_mcore.parallel.topology import Topology
from grpo_mcore.policy import Policy

HF = "hf"


@dataclass(frozen=True)
class Progress:
    """How far the run is, besides its weights."""

    step: int = 0  # completed; the policy's version
    cursor: int = 0  # prompts trained on
    seconds: float = 0.0  # wall clock so far


def folder_of(run_dir: str | Path, step: int) -> Path:
    return Path(run_dir) / "checkpoints" / f"step_{step:06d}"


def latest(run_dir: str | Path) -> Path | None:
    """The newest whole checkpoint of a run."""
    found = sorted(p for p in (Path(run_dir) / "checkpoints").glob("step_*") if p.suffix == "" and (p / "run.json").is_file())
    return found[-1] if found else None


def progress_of(folder: Path) -> Progress:
    return Progress(**json.loads((folder / "run.json").read_text()))


def save(run_dir: str | Path, policy: Policy, progress: Progress, *, keep: int) -> None:
    """Collective. Keeps the newest `keep`. Raises InputError on all ranks, and leaves nothing behind, if the disk cannot hold it."""
    folder = folder_of(run_dir, progress.step)
    state = {**_sharded(policy, is_loading=False), "rng": torch.get_rng_state()}
    write(folder, state, policy.topology, progress, hf_folder=policy.folder)
    if policy.topology.is_driver:
        for old in sorted(folder.parent.glob("step_??????"))[:-keep]:
            shutil.rmtree(old)


def write(folder: Path, state: dict, topology: Topology, progress: Progress, *, hf_folder: str | Path) -> None:
    """One checkpoint folder of `state`, whole or not at all. Collective; raises InputError on all ranks."""
    partial = folder.with_suffix(".partial")
    problem = None
    if topology.is_driver:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        problem = _no_room(partial, state)
    problem = collectives.broadcast(problem, topology)
    if problem is None:
        try:
            dist_checkpointing.save(state, partial)
            if topology.is_driver:
                hf_weights.copy_side_files(hf_folder, partial / HF)
                (partial / "run.json").write_text(json.dumps(dataclasses.asdict(progress)))
                shutil.rmtree(folder, ignore_errors=True)
                partial.rename(folder)
        except (OSError, RuntimeError, CheckpointingException, CheckpointException) as e:  # the last is a BaseException
            problem = f"could not be written: {str(e).strip().splitlines()[-1]}"
    problems = [p for p in collectives.gather(problem, topology) if p]
    if problems:
        if topology.is_driver:
            shutil.rmtree(partial, ignore_errors=True)
        remedy = "make room and run the same command: it goes on from the last checkpoint"
        raise InputError("checkpoint", str(folder), problems[0], remedy)


def _no_room(partial: Path, state: dict) -> str | None:
    """Before anything is written, since Megatron's writer processes report a full disk late and obscurely."""
    needed, free = num_bytes(state), shutil.disk_usage(partial).free
    return f"needs {needed / 1e6:.1f} MB, and the disk has {free / 1e6:.1f} MB free" if free < 1.05 * needed + 1e6 else None


def num_bytes(state) -> int:
    """Size of the whole tensors, over all ranks, of a sharded state."""
    sizes: dict[tuple, int] = {}

    def visit(x):
        if isinstance(x, (dict, list, tuple)):
            for value in x.values() if isinstance(x, dict) else x:
                visit(value)
        elif isinstance(x, ShardedTensor):
            sizes[x.key, x.global_shape] = x.dtype.itemsize * torch.Size(x.global_shape).numel()
        elif isinstance(x, ShardedTensorFactory):  # gate and up of one fc1, which are saved apart
            visit(x.build())

    visit(state)
    return sum(sizes.values())


def restore(run_dir: str | Path, policy: Policy) -> Progress:
    """Loads the newest checkpoint, if there is one, whatever its tp and dp. Collective."""
    folder = latest(run_dir)
    if folder is None:
        return Progress()
    state = dist_checkpointing.load({**_sharded(policy, is_loading=True), "rng": torch.get_rng_state()}, folder)
    policy.backbone.load_state_dict(state["model"])
    policy.optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    return progress_of(folder)


def from_hf(hf_folder: str | Path, folder: str | Path, topology: Topology) -> None:
    """A Hugging Face folder as a checkpoint without optimizer, at step 0. Collective."""
    with hf_weights.Reader(hf_folder) as reader:
        dtype = reader.dtype()
    hf_config = model.load_hf_config(str(hf_folder))
    backbone = model.build(hf_config, tp=topology.tp, params_dtype=dtype, device=topology.device)
    hf_weights.load(backbone, hf_config, hf_folder, topology)
    write(Path(folder), {"model": backbone.sharded_state_dict()}, topology, Progress(), hf_folder=hf_folder)


def to_hf(folder: str | Path, hf_folder: str | Path, topology: Topology) -> None:
    """The weights of a checkpoint as a Hugging Face folder, in the checkpoint's dtype. Collective. Raises InputError."""
    side = Path(folder) / HF
    if not side.is_dir():
        raise InputError("checkpoint", str(folder), f"has no {HF}/ folder", "name a folder like RUN/checkpoints/step_000010")
    hf_config = model.load_hf_config(str(side))
    dtype = next(t.dtype for t in dist_checkpointing.load_tensors_metadata(str(folder)).values() if t.key.startswith("decoder."))
    backbone = model.build(hf_config, tp=topology.tp, params_dtype=dtype, device=topology.device)
    backbone.load_state_dict(dist_checkpointing.load({"model": backbone.sharded_state_dict()}, Path(folder))["model"])
    hf_weights.save_folder(hf_folder, hf_weights.export(backbone, hf_config, topology), side, write=topology.is_driver)


def _sharded(policy: Policy, *, is_loading: bool) -> dict:
    weights = policy.backbone.sharded_state_dict()
    return {"model": weights, "optimizer": policy.optimizer.sharded_state_dict(weights, is_loading=is_loading)}
