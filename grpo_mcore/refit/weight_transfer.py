"""What both ends of a refit's data plane share: the order of the tensors, buckets, a gloo group of its own, shared
memory.

The trainer's end is senders.py; the engines' is receiver.py, which vLLM imports: this module must stay light.
"""

import contextlib
import datetime
import itertools
import mmap
import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

Work = dist.Work  # a collective under way

PAGE = 4096  # bytes
RING_BUCKETS = 4


@dataclass(frozen=True)
class TensorInfo:
    name: str  # Hugging Face's
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def num_bytes(infos: Iterable[TensorInfo]) -> int:
    return sum(i.num_bytes for i in infos)


def to_dict(infos: Sequence[TensorInfo]) -> dict:
    """As vLLM's requests name tensors."""
    return {
        "names": [i.name for i in infos],
        "dtype_names": [str(i.dtype).removeprefix("torch.") for i in infos],
        "shapes": [list(i.shape) for i in infos],
    }


def from_dict(d: dict) -> list[TensorInfo]:
    return [
        TensorInfo(name, getattr(torch, dtype), tuple(shape))
        for name, dtype, shape in zip(d["names"], d["dtype_names"], d["shapes"], strict=True)
    ]


def buckets(groups: Iterable[Sequence[TensorInfo]], limit_bytes: int) -> Iterator[list[TensorInfo]]:
    """Consecutive groups of together at most limit_bytes, or one that is larger alone. A group is never cut: its
    tensors come from one parameter of the trainer, and become one of the engine."""
    bucket: list[TensorInfo] = []
    for group in groups:
        if bucket and num_bytes(bucket) + num_bytes(group) > limit_bytes:
            yield bucket
            bucket = []
        bucket.extend(group)
    if bucket:
        yield bucket


def cut(infos: Sequence[TensorInfo], lengths: Sequence[int]) -> list[list[TensorInfo]]:
    """Buckets of so many tensors each."""
    left = iter(infos)
    return [list(itertools.islice(left, length)) for length in lengths]


class Position(NamedTuple):
    """Of a bucket in shared memory."""

    offset: int
    after: int  # so many buckets must have been loaded before this one is written
    lasting: bool  # no other bucket comes here


def positions(buckets: Sequence[Sequence[TensorInfo]], bucket_bytes: int) -> tuple[list[Position], int]:
    """Where buckets stand, and the bytes of it all: in a ring of RING_BUCKETS, so that the sender may run ahead, but
    what is loaded is still in a cache; those above bucket_bytes behind it, each in memory of its own."""

    def whole_pages(size: int) -> int:
        return -(-size // PAGE) * PAGE

    out = []
    taken: list[tuple[int, int, int]] = []  # index, start, end of those in the ring
    at, room = 0, RING_BUCKETS * whole_pages(bucket_bytes)
    end = room
    for index, bucket in enumerate(buckets):
        size = whole_pages(num_bytes(bucket))
        if num_bytes(bucket) > bucket_bytes:
            out.append(Position(end, 0, True))
            end += size
            continue
        if at + size > room:
            at = 0
        after = max((other + 1 for other, start, stop in taken if start < at + size and at < stop), default=0)
        out.append(Position(at, after, False))
        taken.append((index, at, at + size))
        at += size
    return out, end


def unpack(buffer: torch.Tensor, bucket: Sequence[TensorInfo]) -> list[tuple[str, torch.Tensor]]:
    """Named views of a uint8 buffer, one behind the other. The dtypes of one bucket should not increase in size."""
    parts = buffer.split([i.num_bytes for i in bucket])
    return [(i.name, part.view(i.dtype).view(i.shape)) for i, part in zip(bucket, parts, strict=True)]


def ranks(num_ranks: Sequence[int]) -> tuple[list[int], int]:
    """(first rank of each engine, size) of a transfer group whose rank 0 is the sender, from the ranks that each engine
    has."""
    first = [1 + sum(num_ranks[:i]) for i in range(len(num_ranks))]
    return first, 1 + sum(num_ranks)


def open_gloo(address: str, port: int, rank: int, world_size: int, timeout_s: float) -> dist.ProcessGroupGloo:
    """A group apart from torch.distributed's global state: the sender is rank 0 and hosts the store at `address`."""
    timeout = datetime.timedelta(seconds=timeout_s)
    store = dist.TCPStore(address, port, world_size, is_master=rank == 0, timeout=timeout, wait_for_workers=False)
    return dist.ProcessGroupGloo(dist.PrefixStore("weight_transfer", store), rank, world_size, timeout)


def start_broadcast(group: dist.ProcessGroupGloo, buffer: torch.Tensor) -> Work:
    """From rank 0. Its wait raises RuntimeError when the group's time-out passes or a member is gone."""
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    return group.broadcast([buffer], options)  # type: ignore[attr-defined]  # torch's stub leaves it out


def free_port(address: str) -> int:
    with socket.socket() as s:
        s.bind((address, 0))
        return s.getsockname()[1]


def listen() -> socket.socket:
    """For the processes of this machine; its name, getsockname(), is in no file system."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("")
    listener.listen()
    return listener


def join(name: str, timeout_s: float) -> socket.socket:
    """The other end of `listen`. Raises OSError."""
    end = socket.socket(socket.AF_UNIX)
    end.settimeout(timeout_s)
    end.connect(name.encode())
    return end


def in_thread(call: Callable[[], Any], device: torch.device | None = None) -> Future:
    """For what may wait in C for ever, where neither a signal nor a deadline reaches it: who waits for the future may
    give up, and leaves the thread behind. CUDA's current device, and its current stream, are a thread's own."""
    future: Future = Future()

    def run() -> None:
        try:
            if device is not None and device.type == "cuda":
                torch.cuda.set_device(device)
            future.set_result(call())
        except BaseException as e:
            future.set_exception(e)

    threading.Thread(target=run, name="weight transfer", daemon=True).start()
    return future


class Lifeline:
    """The engine's end of a socket that says one thing: it ends when the sender gives up, or is gone."""

    def __init__(self, address: Sequence, timeout_s: float):
        """Raises OSError."""
        self._end = socket.create_connection(tuple(address), timeout_s)
        self._end.settimeout(None)
        self._gone = in_thread(lambda: self._end.recv(1))

    @property
    def is_gone(self) -> bool:
        return self._gone.done()

    def unless_gone(self, under_way: Future) -> None:
        """Waits for it. Raises what it raises, and ConnectionError as soon as the sender is gone."""
        futures.wait([under_way, self._gone], return_when=futures.FIRST_COMPLETED)
        if not under_way.done():
            raise ConnectionError("the sender gave up, or is gone")
        under_way.result()

    def when_gone(self, call: Callable[[], object]) -> None:
        """In a thread; at once if it is."""
        self._gone.add_done_callback(lambda _: call())

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._end.shutdown(socket.SHUT_RDWR)


def pass_turn(end: socket.socket) -> None:
    end.sendall(b"t")


def await_turn(end: socket.socket) -> None:
    """Raises OSError when the socket's time-out passes or the other end is gone."""
    if not end.recv(1):
        raise ConnectionError("the other end is gone")


class SharedMemory:
    """Bytes that several processes of one machine see. They have no name in any file system, and are gone with the last
    process that has them open, however it ends; the size of /dev/shm does not bound them."""

    def __init__(self, num_bytes: int):
        self.num_bytes = num_bytes
        self._fd = os.memfd_create("weight_transfer")
        os.ftruncate(self._fd, num_bytes)
        self.bytes = _map(self._fd, num_bytes)

    @property
    def path(self) -> str:
        """Where other processes of the same user find it, as long as it is open here."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def close(self) -> None:
        """The memory itself goes with the last view of it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            del self.bytes


def open_shared(path: str, num_bytes: int) -> torch.Tensor:
    """uint8 [num_bytes], another process's SharedMemory. Raises OSError."""
    fd = os.open(path, os.O_RDWR)
    try:
        return _map(fd, num_bytes)
    finally:
        os.close(fd)


def _map(fd: int, num_bytes: int) -> torch.Tensor:
    # Populated: a page's first touch costs more than its copy.
    return torch.frombuffer(mmap.mmap(fd, num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE), dtype=torch.uint8)
