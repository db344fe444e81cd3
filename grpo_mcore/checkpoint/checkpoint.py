"""Checkpoints that prove themselves: weights, optimizer, generators, prompt cursor, step.

RUN/checkpoints/step_000010/ holds Megatron's distributed checkpoint, which any layout can load; run.json (step, cursor,
seconds, layout); hf/ (the model's config and tokenizer, which launch/convert.py needs); and attest.json, written last:
the digest of every file, and of every part of the weights as they were in the model. A save is written in the
background under another name, read back, compared with the live weights' digests, and only then renamed: a folder of
that name is whole and holds the weights of its step. When it is loaded the files are compared with their digests again.
"""

import concurrent.futures
import contextlib
import dataclasses
import inspect
import json
import math
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException

from grpo_mcore.checkpoint import optimizer_state
from grpo_mcore.checkpoint.stored import Stored, digest, file_digest
from grpo_mcore.config import config
from grpo_mcore.config.config import InputError
from grpo_mcore.parallel import collectives
from grpo_mcore.parallel.topology import Topology
from grpo_mcore.policy import hf_weights
from grpo_mcore.policy.model import HFConfig
from grpo_mcore.policy.policy import Policy
from grpo_mcore.report import run_folder

HF, RUN, ATTEST = "hf", "run.json", "attest.json"
# Newer Megatrons have several ways to write in the background, and by default one of another package.
_BACKGROUND = {"async_sharded_save": True} | (
    {"async_strategy": "mcore"} if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters else {}
)


class AttestationError(config.RunError):
    """What was written is not what the policy holds."""


@dataclass(frozen=True)
class Progress:
    """How far the run is, besides its weights."""

    step: int = 0  # completed; the policy's version
    cursor: int = 0  # prompts trained on
    seconds: float = 0.0  # wall clock so far
    # of each source the ids of prompts that are not sampled again (data.max_pass_rate)
    left_out: list[list[int]] = dataclasses.field(default_factory=list)


def folder_of(run_dir: str | Path, step: int) -> Path:
    return Path(run_dir) / "checkpoints" / f"step_{step:06d}"


def published(run_dir: str | Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    return sorted(
        (p for p in (Path(run_dir) / "checkpoints").glob("step_*") if p.suffix == "" and (p / ATTEST).is_file()),
        reverse=True,
    )


def progress_of(folder: Path) -> Progress:
    run = json.loads((folder / RUN).read_text())
    run.setdefault("left_out", [])  # an older version's has none
    return Progress(**{f.name: run[f.name] for f in dataclasses.fields(Progress)})


def newest_step(run_dir: str | Path) -> int:
    """Of the published checkpoints; 0 without any."""
    done = published(run_dir)
    return progress_of(done[0]).step if done else 0


def ranked(run_dir: str | Path, metric: str) -> list[tuple[Path, float]]:
    """The checkpoints of whose step the metric is known and a number, and its value: highest first, of equals the
    newest."""
    rows = run_folder.read_metrics(run_dir)
    value = {row["step"]: number for row in rows for number in run_folder.numbers([row], metric)}
    found = [(folder, value[step]) for folder in published(run_dir) if (step := progress_of(folder).step) in value]
    return sorted(found, key=lambda one: one[1], reverse=True)


class Checkpoints:
    """Of one run and policy. Collective: every rank makes one, and calls each method when the others do."""

    def __init__(self, run_dir: str | Path, policy: Policy, cfg: config.Checkpoint):
        self._run_dir, self._policy, self._topology, self._cfg = run_dir, policy, policy.topology, cfg
        self._writing: Writing | None = None
        self.newest_step = 0  # saved, or being saved

    def restore(self) -> Progress:
        """Loads the newest good checkpoint, if there is any, whatever its layout. Names each that is passed over.
        Without any, begins at step 0 with the weights and the optimizer of checkpoint.start_from.

        Raises InputError if there are checkpoints, and none is good.
        """
        found = collectives.broadcast(published(self._run_dir), self._topology)
        self._say_what_is_half_written()
        for folder in found:
            problem = self._problem_with(folder)
            if problem is None:
                self._load(folder)
                progress = progress_of(folder)
                self.newest_step = progress.step
                return progress
            if self._topology.is_driver:
                print(f"checkpoint {folder} is passed over: {problem}", flush=True)
        if found:
            raise InputError(
                "run_dir",
                str(self._run_dir),
                "has checkpoints, and each of them is damaged (named above)",
                "remove its checkpoints/ to start anew, or name another run_dir",
            )
        if start := self._cfg.start_from:
            problem = self._problem_with(Path(start)) if (Path(start) / ATTEST).is_file() else "there is no checkpoint"
            if problem:
                raise InputError(
                    "checkpoint.start_from", start, problem, "name a folder like RUN/checkpoints/step_000010"
                )
            self._load(Path(start))
        return Progress()

    def save(self, progress: Progress) -> None:
        """Begins a save, and returns while it is written, unless checkpoint.asynchronous is off. Waits for the one
        before.

        Raises InputError on all ranks, and leaves nothing behind, if the disk cannot hold it.
        """
        self.wait()
        policy = self._policy
        policy.finish_param_gather()
        weights = _weights(policy)
        state = {**weights, "optimizer": optimizer_state.sharded(policy, weights), "rng": _generators(self._topology)}
        self._writing = Writing(
            folder_of(self._run_dir, progress.step), state, weights, progress, self._topology, hf_folder=policy.folder
        )
        self.newest_step = progress.step
        if not self._cfg.asynchronous:
            self.wait()

    def poll(self) -> None:
        """Publishes the save in flight if it is written and read back. Raises on all ranks InputError,
        AttestationError."""
        if self._writing is not None and self._writing.is_done():
            writing, self._writing = self._writing, None
            writing.publish()
            if self._topology.is_driver:
                self._remove_old()

    def wait(self) -> None:
        """Until the save in flight is published. Raises also TimeoutError."""
        if self._writing is not None:
            self._writing.wait(self._cfg.timeout_s)
            self.poll()

    def _load(self, folder: Path) -> None:
        policy = self._policy
        weights = _weights(policy)
        state = {**weights, "optimizer": optimizer_state.to_fill(policy, weights)}
        same_layout = json.loads((folder / RUN).read_text())["layout"] == _layout(self._topology)
        if same_layout:  # another one has other generators, and keeps those it was seeded with
            state["rng"] = _generators(self._topology)
        state = dist_checkpointing.load(state, folder)
        for index, chunk in enumerate(policy.chunks):
            with _trusted_pickles():
                missing, unexpected = chunk.load_state_dict(state[f"model{index}"], strict=False)
            if unexpected or any(not name.endswith("_extra_state") for name in missing):
                raise RuntimeError(f"{folder} and the model differ in {[*missing, *unexpected]}")
        optimizer_state.finish_loading(policy, state["optimizer"])
        if same_layout:
            _set_generators(state["rng"])

    def _problem_with(self, folder: Path) -> str | None:
        """What is wrong with a checkpoint's files, the same on every rank."""
        recorded = json.loads((folder / ATTEST).read_text())["files"]
        seen = _merged(_file_digests(folder, _share_of_files(folder, self._topology)), self._topology)
        for name in sorted(recorded):
            if seen.get(name) != recorded[name]:
                return f"its file {name} {'is not what was written' if name in seen else 'is missing'}"
        return None

    def _say_what_is_half_written(self) -> None:
        if self._topology.is_driver:
            for partial in sorted((Path(self._run_dir) / "checkpoints").glob("step_*.partial")):
                print(f"checkpoint {partial} is half-written: removed", flush=True)
                shutil.rmtree(partial)

    def _remove_old(self) -> None:
        """All but the newest `keep` and the `keep_best` with the highest best_metric."""
        best = [folder for folder, _ in ranked(self._run_dir, self._cfg.best_metric)[: self._cfg.keep_best]]
        for folder in published(self._run_dir)[self._cfg.keep :]:
            if folder not in best:
                shutil.rmtree(folder)


class Writing:
    """One checkpoint on its way: begun here, written and then read back in the background, attested and published by
    `publish`. Collective."""

    def __init__(
        self, folder: Path, state: dict, weights: dict, progress: Progress, topology: Topology, *, hf_folder: str | Path
    ):
        """`state` is all that is saved, `weights` the part of it that is attested. Raises InputError on all ranks."""
        self._folder, self._partial, self._hf_folder = folder, folder.with_suffix(".partial"), hf_folder
        self._progress, self._topology = progress, topology
        self._live = {part: digest(tensor.data) for part, tensor in _parts(weights)}
        self._queue = AsyncCallsQueue(persistent=False)
        self._reading: concurrent.futures.Future[tuple[dict, dict]] | None = None
        problem, needed = None, num_bytes(state, topology)
        if topology.is_driver:
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir(parents=True)
            problem = _no_room(self._partial, needed)
        self._raise(collectives.broadcast(problem, topology))
        try:
            self._queue.schedule_async_request(dist_checkpointing.save(state, self._partial, **_BACKGROUND))
        except (OSError, RuntimeError, CheckpointingException) as e:
            problem = _last_line(e)
        self._raise(problem)

    def is_done(self) -> bool:
        """Whether it is written and read back."""
        if self._reading is None:
            if not self._is_written():
                return False
            self._add_side_files()
            mine = _share_of_files(self._partial, self._topology)
            self._reading = _in_background(lambda: self._read_back(mine))
        return not collectives.on_any_rank(not self._reading.done(), self._topology)

    def _is_written(self) -> bool:
        problem = None
        try:
            self._queue.maybe_finalize_async_calls(blocking=False)
        # The last is a BaseException; each is raised on every rank.
        except (OSError, RuntimeError, CheckpointException) as e:
            problem = _last_line(e)
            self._queue = AsyncCallsQueue(persistent=False)
        self._raise(problem)
        return self._queue.get_num_unfinalized_calls() == 0

    def wait(self, timeout_s: float) -> None:
        """Until it is done. Raises TimeoutError on all ranks."""
        end = time.monotonic() + timeout_s
        while not self.is_done():
            if collectives.on_any_rank(time.monotonic() > end, self._topology):
                raise TimeoutError(f"checkpoint: {self._folder} was still being written after {timeout_s:.0f} s")
            time.sleep(0.02)

    def _add_side_files(self) -> None:
        if self._topology.is_driver:
            hf_weights.copy_side_files(self._hf_folder, self._partial / HF)
            run = {**dataclasses.asdict(self._progress), "layout": _layout(self._topology)}
            (self._partial / RUN).write_text(json.dumps(run))

    def _read_back(self, files: list[str]) -> tuple[dict[tuple, str], dict[str, str]]:
        """Digests of the weights that this rank wrote, and of its share of the files."""
        stored = Stored(self._partial)
        return {part: digest(stored.read(*part)) for part in self._live}, _file_digests(self._partial, files)

    def publish(self) -> None:
        """When it is done: compares the weights with what they were in the model, and gives the folder its name."""
        assert self._reading is not None
        error = self._reading.exception()
        self._raise(f"could not be read back: {error}" if isinstance(error, OSError) else None)
        read, files = self._reading.result()
        live, read, files = (_merged(mine, self._topology) for mine in (self._live, read, files))
        wrong = [part for part in live if live[part] != read[part]]
        if wrong:
            before = next(iter(published(self._folder.parent.parent)), None)
            if before is not None and json.loads((before / ATTEST).read_text())["weights"] == _named(read):
                what = f"holds the weights of {before}, although the policy has moved since"
            else:
                more = f" and {len(wrong) - 1} more parts" if len(wrong) > 1 else ""
                what = f"differs from the policy in {wrong[0][0]} at {wrong[0][1]}{more}"
            raise AttestationError(
                f"checkpoint {self._folder} is not published: what was written {what}; it stays as {self._partial}"
            )
        if self._topology.is_driver:
            (self._partial / ATTEST).write_text(json.dumps({"weights": _named(live), "files": files}, indent=1))
            shutil.rmtree(self._folder, ignore_errors=True)
            self._partial.rename(self._folder)

    def _raise(self, problem: str | None) -> None:
        """One rank's problem on all of them."""
        problems = [p for p in collectives.gather(problem, self._topology) if p]
        if problems:
            if self._topology.is_driver:
                shutil.rmtree(self._partial, ignore_errors=True)
            raise InputError(
                "checkpoint",
                str(self._folder),
                problems[0],
                "make room, and run the same command: it goes on from the last checkpoint",
            )


def _weights(policy: Policy) -> dict:
    """Sharded, by chunk. Transformer Engine's extra state is kept where it is state: the scales of delayed FP8."""
    keep = policy.precision.fp8 == "delayed"
    return {
        f"model{index}": {
            name: x for name, x in chunk.sharded_state_dict().items() if keep or not name.endswith("_extra_state")
        }
        for index, chunk in enumerate(policy.chunks)
    }


def _generators(topology: Topology) -> ShardedObject:
    """The random generators of this rank, one place for each rank of every axis."""
    cuda = torch.cuda.get_rng_state() if topology.device.type == "cuda" else None
    tensor_parallel = get_cuda_rng_tracker().get_states()
    states = dict(python=random.getstate(), torch=torch.get_rng_state(), cuda=cuda, tensor_parallel=tensor_parallel)
    places = (topology.pp, topology.tp, topology.dp * topology.cp)
    place = (topology.pp_rank, topology.tp_rank, topology.dp_rank * topology.cp + topology.cp_rank)
    return ShardedObject("rng", states, places, place)


def _set_generators(states: dict) -> None:
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])
    get_cuda_rng_tracker().set_states(states["tensor_parallel"])


def _layout(topology: Topology) -> dict[str, int]:
    p = topology.parallel
    return {"tp": p.tp, "pp": p.pp, "virtual_pp": p.virtual_pp, "cp": p.cp, "dp": topology.dp}


def _sharded_tensors(state) -> Iterator[ShardedTensor]:
    """Of a nested sharded state."""
    if isinstance(state, (dict, list, tuple)):
        for value in state.values() if isinstance(state, dict) else state:
            yield from _sharded_tensors(value)
    elif isinstance(state, ShardedTensor):
        yield state
    elif isinstance(state, ShardedTensorFactory):  # gate and up of one fc1, which are saved apart
        yield from _sharded_tensors(state.build())


def _parts(state) -> Iterator[tuple[tuple, ShardedTensor]]:
    """((key, offset, shape), tensor) of the parts that this rank, and no other, writes."""
    for tensor in _sharded_tensors(state):
        if is_main_replica(tensor.replica_id):
            shape = (*[1] * tensor.prepend_axis_num, *tensor.local_shape)
            yield (tensor.key, tuple(tensor.global_offset), shape), tensor


def _named(digests: dict[tuple, str]) -> dict[str, str]:
    return {f"{key} {offset} {shape}": value for (key, offset, shape), value in sorted(digests.items())}


def _share_of_files(folder: Path, topology: Topology) -> list[str]:
    """This rank's, of all but attest.json. Collective."""
    names = collectives.broadcast(
        sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != ATTEST), topology
    )
    return names[topology.rank :: topology.world_size]


def _file_digests(folder: Path, names: list[str]) -> dict[str, str]:
    return {name: file_digest(folder / name) for name in names}


def _merged(mine: dict, topology: Topology) -> dict:
    """Of every rank. Collective."""
    return {key: value for one in collectives.gather(mine, topology) for key, value in one.items()}


def _in_background(work: Callable) -> concurrent.futures.Future:
    """Of a thread that ends with the process: who gives a save up does not wait for it."""
    future: concurrent.futures.Future = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as e:
            future.set_exception(e)

    threading.Thread(target=run, daemon=True).start()
    return future


@contextlib.contextmanager
def _trusted_pickles() -> Iterator[None]:
    """Transformer Engine has the scales of delayed FP8 as pickles, which it reads only when told that it may: the files
    have just been compared with their digests."""
    name = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def check_room(cfg: config.Config, hf_config: HFConfig) -> str:
    """What a run's checkpoints take at once, and what there is, before the run begins. Raises InputError."""
    run_dir, c = Path(cfg.run_dir).absolute(), cfg.checkpoint
    # Besides the weights, float32 ones if they are not, and Adam's two moments.
    of_parameter = 12 if cfg.precision.params == "float32" else 14
    one = of_parameter * sum(math.prod(shape) for shape in hf_weights.shapes(hf_config).values())
    # What is kept, and the next one, until it is published.
    at_once = min(c.keep + c.keep_best + 1, -(-cfg.num_steps // c.every)) if c.every else 1
    more = max(at_once - len(published(run_dir)), 1)
    free = shutil.disk_usage(next(p for p in (run_dir, *run_dir.parents) if p.exists())).free
    words = f"{at_once} of {one / 1e9:.3g} GB at once, and the disk has {free / 1e9:.3g} GB free"
    if free < more * one:
        raise InputError("run_dir", cfg.run_dir, f"holds checkpoints, {words}", "make room, or lower checkpoint.keep")
    return words


def _no_room(partial: Path, needed: int) -> str | None:
    """Before anything is written, since Megatron's writer processes report a full disk late and obscurely."""
    free = shutil.disk_usage(partial).free
    if free >= 1.05 * needed + 1e6:
        return None
    return f"needs {needed / 1e6:.1f} MB, and the disk has {free / 1e6:.1f} MB free"


def num_bytes(state, topology: Topology) -> int:
    """Size of the whole tensors of a sharded state, of which a rank may have no part. Collective."""
    sizes = {t.key: t.dtype.itemsize * torch.Size(t.global_shape).numel() for t in _sharded_tensors(state)}
    return sum(_merged(sizes, topology).values())


def _last_line(e: BaseException) -> str:
    return f"could not be written: {str(e).strip().splitlines()[-1]}"
