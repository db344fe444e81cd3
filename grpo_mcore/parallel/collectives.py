"""The few collectives that the stages need, by what they mean. Each is bounded by the time-out of its group."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from grpo_mcore.parallel.topology import Topology


def broadcast(value, topology: Topology):
    """The driver's `value`, a picklable object, on every rank."""
    box = [value]
    if topology.world_size > 1:
        dist.broadcast_object_list(box, src=0, group=topology.control_group)
    return box[0]


def gather(value, topology: Topology) -> list:
    """Every rank's `value`, a picklable object, in rank order, on every rank."""
    out = [None] * topology.world_size
    dist.all_gather_object(out, value, group=topology.control_group)
    return out


def together(step: Callable[[], Any], topology: Topology) -> list:
    """What step() gives on each rank, a picklable object, in rank order, on every rank. If it raises RuntimeError or
    OSError on one, every rank raises it here, the others a RuntimeError that says what it says: all go on, or none."""
    given = error = None
    try:
        given = step()
    except (RuntimeError, OSError) as e:
        error = e
    outcomes = gather((given, error and str(error)), topology)
    if error is not None:
        raise error
    for rank, (_, problem) in enumerate(outcomes):
        if problem is not None:
            raise RuntimeError(f"rank {rank}: {problem}")
    return [given for given, _ in outcomes]


def on_any_rank(flag: bool, topology: Topology) -> bool:
    """Whether the flag is set on any rank."""
    tensor = torch.tensor(int(flag))
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group=topology.control_group)
    return bool(tensor)


def start_gather(shard: torch.Tensor, topology: Topology) -> Callable[[], list[torch.Tensor]]:
    """Starts the gathering of one parameter's equal-shaped shards; the result waits for them, in tp order, on every tp
    rank."""
    if topology.tp == 1:
        return lambda: [shard]
    shard = shard.contiguous()
    shards = [torch.empty_like(shard) for _ in range(topology.tp)]
    work = dist.all_gather(shards, shard, group=topology.tp_group, async_op=True)

    def arrival() -> list[torch.Tensor]:
        work.wait()
        return shards

    return arrival


def sum_over_context(tensor: torch.Tensor, topology: Topology) -> torch.Tensor:
    """The sum over the context ranks, which hold parts of the same sequences. Every rank's loss has a part in it, so a
    rank's gradient is the sum of all ranks'. Collective over them, also in the backward."""
    if topology.cp == 1:
        return tensor
    from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

    parts = gather_from_sequence_parallel_region(tensor.to(topology.device)[None], group=topology.cp_group)
    return parts.sum(0).to(tensor.device)


def from_stage(tensor: torch.Tensor, stage: int, topology: Topology) -> torch.Tensor:
    """One stage's `tensor` on the other stages of its pipeline, in place."""
    if topology.pp > 1:
        dist.broadcast(tensor, group=topology.pp_group, group_src=stage)
    return tensor
