"""Which ranks there are, where this one stands, and the groups it talks in: one immutable value, asked by everybody."""

import datetime
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from grpo_mcore.config.config import InputError, Parallel
from grpo_mcore.parallel import cpu

# What vLLM pins in the processes of its batch-invariant engines (`override_envs_for_invariance`, 0.26 to 0.32). NCCL
# never compares its variables between the ranks of a communicator: where they choose otherwise, they hang.
DETERMINISTIC_NCCL = {
    "NCCL_LAUNCH_MODE": "GROUP",
    "NCCL_COLLNET_ENABLE": "0",
    "NCCL_NVLS_ENABLE": "0",
    "NCCL_P2P_NET_DISABLE": "1",
    "NCCL_MIN_NCHANNELS": "1",
    "NCCL_MAX_NCHANNELS": "1",
    "NCCL_PROTO": "Simple",
    "NCCL_ALGO": "ring,tree;allreduce:tree",
    "NCCL_NTHREADS": "1",
    "NCCL_SOCKET_NTHREADS": "1",
}


@dataclass(frozen=True)
class Topology:
    """Sizes and coordinates of every axis, and the groups to talk in. Make it with `connect`."""

    parallel: Parallel
    device: torch.device
    world_size: int
    rank: int
    tp_rank: int
    pp_rank: int
    cp_rank: int
    dp: int
    dp_rank: int
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    control_group: dist.ProcessGroup  # all ranks, gloo: Python objects travel here

    @property
    def tp(self) -> int:
        return self.parallel.tp

    @property
    def pp(self) -> int:
        return self.parallel.pp

    @property
    def cp(self) -> int:
        return self.parallel.cp

    @property
    def is_driver(self) -> bool:
        """The one rank that talks to engines, files and the console."""
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank has the head, and with it log-probs and losses."""
        return self.pp_rank == self.pp - 1

    @property
    def head_group(self) -> dist.ProcessGroup | None:
        """The ranks that share the vocabulary; None if one has it whole."""
        return self.tp_group if self.tp > 1 else None

    @property
    def in_driver_replica(self) -> bool:
        """Whether this rank's shards are part of the copy of the model that the driver has a part of."""
        return self.dp_rank == 0 and self.cp_rank == 0

    @property
    def reports(self) -> bool:
        """Whether this rank's loss terms count: one of the tp ranks that compute the same ones."""
        return self.is_last_stage and self.tp_rank == 0


def world_size() -> int:
    """Number of ranks torchrun started; 1 under plain python."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def nccl_environment(deterministic: bool) -> dict[str, str]:
    """NCCL's variables of this run, for trainers and engines alike: this process's, and what makes it deterministic."""
    given = {name: value for name, value in os.environ.items() if name.startswith("NCCL_")}
    return given | (DETERMINISTIC_NCCL if deterministic else {})


def pick_device(device: str) -> torch.device:
    """'auto', 'cpu' or 'cuda' to this rank's device. Raises RuntimeError for a CUDA that is not there."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError("device = 'cuda', but torch sees no CUDA device. Remedy: device=cpu, or mend the driver.")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def connect(
    parallel: Parallel,
    *,
    device: torch.device,
    timeout_s: float,
    seed: int,
    num_threads: int = 1,
    deterministic: bool = False,
) -> Topology:
    """Joins torchrun's ranks (or makes a world of one), builds Megatron's process groups and seeds its generators.

    `num_threads` are this rank's CPU threads. `timeout_s` bounds every collective: a rank that waits longer fails, and
    torchrun ends the others. Raises InputError for a CPU where torch sees a GPU.
    """
    if device.type == "cpu" and torch.cuda.is_available():
        raise InputError(
            "device", "cpu", "cannot be kept where torch sees a GPU: Megatron takes it", "set CUDA_VISIBLE_DEVICES=''"
        )
    torch.set_num_threads(num_threads)
    nccl = nccl_environment(deterministic)
    if deterministic:  # of cuBLAS, Transformer Engine's attention, NCCL and torch's own kernels, in this order
        os.environ |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}
        os.environ |= nccl
        torch.use_deterministic_algorithms(True)
    cpu.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    timeout = datetime.timedelta(seconds=timeout_s)
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    if dist.is_initialized():
        pass  # another layout of the same ranks
    elif "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.virtual_pp if parallel.virtual_pp > 1 else None,
        context_parallel_size=parallel.cp,
        distributed_timeout_minutes=timeout_s / 60,
    )
    os.environ |= nccl  # Megatron has taken NCCL_COLLNET_ENABLE away, which engines have
    model_parallel_cuda_manual_seed(seed)
    return Topology(
        parallel=parallel,
        device=device,
        world_size=dist.get_world_size(),
        rank=dist.get_rank(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        dp=parallel_state.get_data_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        cp_group=parallel_state.get_context_parallel_group(),
        control_group=dist.new_group(backend="gloo", timeout=timeout),
    )


def disconnect(*, leave: bool = True) -> None:
    """Ends the layout, and, unless `leave` is False, the ranks' connection: they can `connect` in another layout."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if leave:
        dist.destroy_process_group()
    else:  # Megatron forgets its groups, and each would keep gloo's threads
        for group in [g for g in dist.distributed_c10d._world.pg_map if g is not dist.group.WORLD]:
            dist.destroy_process_group(group)


def wait_for_file(path: Path, timeout_s: float) -> None:
    """Until the driver has made `path`, before there is a process group to wait in. Raises TimeoutError."""
    end = time.monotonic() + timeout_s
    while not path.is_file():
        if time.monotonic() > end:
            raise TimeoutError(f"rank {rank()} waited {timeout_s:.0f} s for the driver to make {path}")
        time.sleep(0.2)
