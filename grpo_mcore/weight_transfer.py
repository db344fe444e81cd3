"""The wire of a refit: one sender (the trainer's driver, rank 0 of the transfer group) and every engine's workers.

Control goes through vLLM's weight-transfer verbs (engine.py); here is the data plane, a stream of tensors in buckets.
gloo is ours on both ends (the other end is gloo_receiver.py); NCCL's other end is vLLM's own.
"""

import datetime
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class TensorInfo:
    name: str  # Hugging Face's
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def update_info(infos: Sequence[TensorInfo]) -> dict:
    """vLLM's update_info, the same for both backends."""
    return {
        "names": [i.name for i in infos],
        "dtype_names": [str(i.dtype).removeprefix("torch.") for i in infos],
        "shapes": [list(i.shape) for i in infos],
    }


def buckets(infos: Iterable[TensorInfo], limit_bytes: int) -> Iterator[list[TensorInfo]]:
    """Consecutive tensors of together at most limit_bytes, or one that is larger alone. Both ends must cut alike."""
    bucket, size = [], 0
    for info in infos:
        if bucket and size + info.num_bytes > limit_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append(info)
        size += info.num_bytes
    if bucket:
        yield bucket


def unpack(buffer: torch.Tensor, bucket: Sequence[TensorInfo]) -> list[tuple[str, torch.Tensor]]:
    """Named views of a uint8 buffer. Offsets are byte sizes, so the dtypes of one bucket should not decrease in size."""
    parts = buffer.split([i.num_bytes for i in bucket])
    return [(i.name, part.view(i.dtype).view(i.shape)) for i, part in zip(bucket, parts, strict=True)]


def open_gloo(address: str, port: int, rank: int, world_size: int, timeout_s: float) -> dist.ProcessGroup:
    """A group apart from torch.distributed's global state: the sender is rank 0 and hosts the store."""
    timeout = datetime.timedelta(seconds=timeout_s)
    store = dist.TCPStore(address, port, world_size, is_master=rank == 0, timeout=timeout, wait_for_workers=False)
    return dist.ProcessGroupGloo(dist.PrefixStore("weight_transfer", store), rank, world_size, timeout)


def broadcast_gloo(group: dist.ProcessGroup, buffer: torch.Tensor) -> None:
    """From rank 0. Raises RuntimeError when the group's time-out passes or a member is gone."""
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    group.broadcast([buffer], options).wait()


def free_port(address: str) -> int:
    with socket.socket() as s:
        s.bind((address, 0))
        return s.getsockname()[1]


class GlooSender:
    backend = "gloo"

    def __init__(self, address: str, world_size: int, bucket_bytes: int, timeout_s: float):
        self._args = (address, free_port(address))
        self._world_size, self._bucket_bytes, self._timeout_s = world_size, bucket_bytes, timeout_s

    def init_info(self, rank_offset: int) -> dict:
        """For the engine whose first worker has rank `rank_offset` of the group."""
        address, port = self._args
        return {"master_address": address, "master_port": port, "rank_offset": rank_offset, "world_size": self._world_size,
                "bucket_bytes": self._bucket_bytes, "timeout_s": self._timeout_s}

    def open(self) -> None:
        """Blocks until every engine has joined; to be called while the engines initialise."""
        self._group = open_gloo(*self._args, 0, self._world_size, self._timeout_s)

    def send(self, infos: Sequence[TensorInfo], tensors: Iterator[torch.Tensor]) -> None:
        """Streams the tensors, in the order of infos, while the engines' update_weights runs."""
        for bucket in buckets(infos, self._bucket_bytes):
            buffer = torch.empty(sum(i.num_bytes for i in bucket), dtype=torch.uint8)
            for _, view in unpack(buffer, bucket):
                view.copy_(next(tensors))
            broadcast_gloo(self._group, buffer)


class NcclSender:
    """The sender of vLLM's own `nccl` backend (vllm 0.32: packed settings travel in init_info)."""

    backend = "nccl"

    def __init__(self, address: str, world_size: int, bucket_bytes: int, timeout_s: float):
        self._info = {"master_address": address, "master_port": free_port(address), "world_size": world_size,
                      "packed": True, "packed_buffer_size_bytes": bucket_bytes, "packed_num_buffers": 2}

    def init_info(self, rank_offset: int) -> dict:
        return {**self._info, "rank_offset": rank_offset}

    def open(self) -> None:
        from vllm.distributed.weight_transfer.nccl_common import trainer_init

        self._communicator = trainer_init(self._info)

    def send(self, infos: Sequence[TensorInfo], tensors: Iterator[torch.Tensor]) -> None:
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        packed_nccl_broadcast_producer(
            iterator=((i.name, t.to(i.dtype)) for i, t in zip(infos, tensors, strict=True)),
            group=self._communicator,
            src=0,
            post_iter_func=lambda named: named[1],
            buffer_size_bytes=self._info["packed_buffer_size_bytes"],
            num_buffers=self._info["packed_num_buffers"],
        )
