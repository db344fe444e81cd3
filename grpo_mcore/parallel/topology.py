"""Which ranks there are, where this one stands, and the groups it talks in: one immutable value, asked by everybody."""

import datetime
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from grpo_mcore.parallel import cpu


@dataclass(frozen=True)
class Topology:
    """Sizes and coordinates of the axes tp (tensor) and dp (data). Make it with `connect`."""

    world_size: int
    rank: int
    tp: int
    tp_rank: int
    dp: int
    dp_rank: int
    device: torch.device
    tp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    control_group: dist.ProcessGroup  # all ranks, gloo: Python objects travel here

    @property
    def is_driver(self) -> bool:
        """The one rank that talks to engines, files and the console."""
        return self.rank == 0


def world_size() -> int:
    """Number of ranks torchrun started; 1 under plain python."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def pick_device(device: str) -> torch.device:
    """'auto', 'cpu' or 'cuda' to this rank's device. Raises RuntimeError for a CUDA that is not there."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError("device = 'cuda', but torch sees no CUDA device. Remedy: device=cpu, or mend the driver.")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def connect(*, tp: int, device: torch.device, timeout_s: float, seed: int, num_threads: int = 1) -> Topology:
    """Joins torchrun's ranks (or makes a world of one), builds Megatron's process groups and seeds its generators.

    `num_threads` are this rank's CPU threads. `timeout_s` bounds every collective: a rank that waits longer fails, and torchrun ends the others.
    """
    torch.set_num_threads(num_threads)
    cpu.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    timeout = datetime.timedelta(seconds=timeout_s)
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp, distributed_timeout_minutes=timeout_s / 60)
    model_parallel_cuda_manual_seed(seed)
    return Topology(
        world_size=dist.get_world_size(),
        rank=dist.get_rank(),
        tp=tp,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        dp=parallel_state.get_data_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        device=device,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        control_group=dist.new_group(backend="gloo", timeout=timeout),
    )


def disconnect() -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def wait_for_file(path: Path, timeout_s: float) -> None:
    """Until the driver has made `path`, before there is a process group to wait in. Raises TimeoutError."""
    end = time.monotonic() + timeout_s
    while not path.is_file():
        if time.monotonic() > end:
            raise TimeoutError(f"rank {rank()} waited {timeout_s:.0f} s for the driver to make {path}")
        time.sleep(0.2)
