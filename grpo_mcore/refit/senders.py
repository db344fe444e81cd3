"""The trainer's end of a refit's data plane. Control goes through vLLM's weight-transfer verbs (engine.py); here is
what carries the bytes.

    broadcast   GlooSender, NcclSender    one stream to all engines, wherever they are, which load as it comes
    shared      SharedSender, IpcSender   engines on the trainer's machine (IPC: on its GPUs) read a bucket where it was
                written

A bucket is filled while the one before it is under way.
"""

import base64
import functools
import pickle
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from concurrent.futures import Future
from typing import NamedTuple, Protocol

import torch

from grpo_mcore.config.config import InputError, RunError
from grpo_mcore.parallel import collectives
from grpo_mcore.parallel.topology import Topology
from grpo_mcore.refit.weight_transfer import (
    SharedMemory,
    TensorInfo,
    Work,
    await_turn,
    buckets,
    free_port,
    in_thread,
    listen,
    num_bytes,
    open_gloo,
    pass_turn,
    positions,
    start_broadcast,
    to_dict,
    unpack,
)

# (update_info, what) -> a wait with a deadline: starts the update on all engines; `what` names the tensors in its
# error. wait(beside=future) waits for what the sender does meanwhile, too.
Update = Callable[[dict, str], Callable[..., object]]
ABORT_S = 30.0  # for NCCL to stop


class BrokenWire(RuntimeError):
    """An engine at the other end failed, or is late."""


class Place(NamedTuple):
    """Where a trainer rank or an engine's process computes."""

    host: str
    gpu: str  # UUID; "" on a CPU


def choose(transport: str, engines: Sequence[Sequence[Place]], trainers: Sequence[Place]) -> str:
    """The vLLM backend of refit.transport, from where each process of each engine and each trainer rank is. Raises
    InputError."""
    cuda = bool(trainers[0].gpu)
    near = set(trainers if cuda else trainers[:1])  # on a CPU the driver alone sends
    apart = next((place for engine in engines for place in engine if place not in near), None)
    if transport == "shared" and apart:
        raise InputError(
            "refit.transport",
            transport,
            f"needs every engine on {'the GPUs' if cuda else 'the machine'} of the trainer; one is on "
            f"{' '.join(apart)}",
            "set it to auto or broadcast, or place the engines there",
        )
    if transport == "broadcast" or apart:
        if cuda and any(trainers[0] in engine for engine in engines):
            raise InputError(
                "refit.transport",
                transport,
                f"is NCCL's for these engines, and it refuses two processes on one GPU: one is on the driver's, "
                f"{' '.join(trainers[0])}",
                "set engine.placement=disaggregated, or start a trainer on the GPU of every engine",
            )
        return "nccl" if cuda else "gloo"
    return "ipc" if cuda else "shared_memory"


def span(bucket: Sequence[TensorInfo]) -> str:
    return bucket[0].name if len(bucket) == 1 else f"{bucket[0].name} to {bucket[-1].name}"


class Stream:
    """The weights of one refit on this rank, written bucket by bucket into a sender's memory."""

    def __init__(
        self,
        groups: Sequence[Sequence[TensorInfo]],
        bucket_bytes: int,
        export: Callable[..., Iterator[tuple[str, torch.Tensor]]],
    ):
        """`export(into=...)` yields (name, tensor) in the order of `groups`, each written to into(name) where that is
        not None."""
        self.bucket_bytes, self.buckets = bucket_bytes, list(buckets(groups, bucket_bytes))
        self.infos = [info for bucket in self.buckets for info in bucket]
        self.at = self.infos[0].name  # what is being sent, for errors
        self.torn = False  # whether the export itself failed: what is left of it cannot be drained
        self._views: dict[str, torch.Tensor] = {}
        self._turn = threading.Lock()  # what a thread is sending may have to be drained
        self._tensors = export(into=lambda name: self._views.get(name))

    @property
    def capacity_bytes(self) -> int:
        """Of the largest bucket."""
        return max(map(num_bytes, self.buckets))

    def fill(self, memory: Callable[[int], torch.Tensor]) -> Iterator[tuple[int, list[TensorInfo], torch.Tensor]]:
        """(index, bucket, its bytes) one after the other; bucket i is written to the front of memory(i), uint8."""
        for index, bucket in enumerate(self.buckets):
            self.at = span(bucket)
            buffer = memory(index)[: num_bytes(bucket)]
            self._views = dict(unpack(buffer, bucket))
            for info in bucket:
                self.at = info.name
                self._next(info)
            self.at = span(bucket)
            yield index, bucket, buffer
        self._views = {}

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """One after the other, in memory of their own."""
        for info in self.infos:
            self.at = info.name
            yield info.name, self._next(info).to(info.dtype)

    def _next(self, info: TensorInfo) -> torch.Tensor:
        try:
            with self._turn:
                name, tensor = next(self._tensors)
        except BaseException:
            self.torn = True
            raise
        if (name, tuple(tensor.shape)) != (info.name, info.shape):
            raise RuntimeError(f"{name} {tuple(tensor.shape)} came where {info.name} {info.shape} was announced")
        return tensor

    def drain(self) -> None:
        """What is left: other ranks take part in its collectives."""
        self._views = {}
        with self._turn:
            for _ in self._tensors:
                pass


class Sender(Protocol):
    def init_info(self, first_rank: int) -> dict:
        """For the engine whose first process has this rank of the group."""

    def open(self) -> Future | None:
        """To be called while the engines initialise. Blocks until every engine has joined, or gives what does."""

    def send(self, stream: Stream, update: Update) -> None:
        """Raises RuntimeError, OSError."""

    def close(self) -> None:
        """Engines that still wait for a bucket fail now. It may be called again."""


class GlooSender:
    def __init__(self, stream: Stream, address: str, world_size: int, timeout_s: float):
        """`stream` is one like those to be sent; the engines reach the sender at `address`."""
        self._args = (address, free_port(address), 0, world_size, timeout_s)
        self._buffers = [torch.empty(stream.capacity_bytes, dtype=torch.uint8) for _ in range(2)]

    def init_info(self, first_rank: int) -> dict:
        address, port, _, world_size, timeout_s = self._args
        return {
            "address": address,
            "port": port,
            "first_rank": first_rank,
            "world_size": world_size,
            "timeout_s": timeout_s,
        }

    def open(self) -> None:
        self._group = open_gloo(*self._args)

    def send(self, stream: Stream, update: Update) -> None:
        wait = update({"lengths": [len(bucket) for bucket in stream.buckets]}, "receiving the broadcast")
        under_way: tuple[Work, str] | None = None
        for _, bucket, buffer in stream.fill(lambda i: self._buffers[i % 2]):
            self._arrive(under_way, stream)
            under_way = start_broadcast(self._group, buffer), span(bucket)
        self._arrive(under_way, stream)
        wait()

    def _arrive(self, under_way: tuple[Work, str] | None, stream: Stream) -> None:
        if under_way:
            work, stream.at = under_way
            try:
                work.wait()
            except RuntimeError as e:
                raise BrokenWire(str(e)) from e

    def close(self) -> None:
        if hasattr(self, "_group"):
            self._group.abort()
            del self._group


class NcclSender:
    """The sender of vLLM's own `nccl` backend. NCCL waits in C for whoever is missing, for ever: threads do it, and
    `close` ends the wait at both ends. Here it aborts the communicator; there the end of a socket tells the engine to
    (Lifeline)."""

    def __init__(self, bucket_bytes: int, address: str, world_size: int, timeout_s: float, device: torch.device):
        self._device, self._timeout_s = device, timeout_s
        self._lifeline = socket.create_server((address, 0), backlog=world_size)  # nobody is accepted, or told anything
        self._info = {
            "master_address": address,
            "master_port": free_port(address),
            "world_size": world_size,
            "packed": True,
            "packed_buffer_size_bytes": bucket_bytes,
            "packed_num_buffers": 2,
        }
        self._joined: Future = Future()  # the communicator
        self._sent: Future | None = None
        self._closed = False

    def init_info(self, first_rank: int) -> dict:
        lifeline = {"lifeline": self._lifeline.getsockname(), "timeout_s": self._timeout_s}
        return {**self._info, "rank_offset": first_rank, **lifeline}

    def open(self) -> Future:
        self._joined = in_thread(self._join, self._device)
        return self._joined

    def _join(self):
        from vllm.distributed.weight_transfer.nccl_common import trainer_init

        return trainer_init(self._info)

    def send(self, stream: Stream, update: Update) -> None:
        wait = update(to_dict(stream.infos), "receiving the broadcast")
        self._sent = in_thread(self._producer(self._unless_closed(stream.tensors())), self._device)
        wait(beside=self._sent)

    def _unless_closed(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for named in tensors:
            yield named
            if self._closed:  # what is left is the caller's to drain
                raise BrokenWire("closed")

    def _producer(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> Callable[[], None]:
        """What sends them, in a thread."""
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        communicator, current = self._joined.result(), torch.cuda.current_stream(self._device)

        def produce() -> None:
            packed_nccl_broadcast_producer(
                iterator=made_on(current, tensors),
                group=communicator,
                src=0,
                post_iter_func=lambda named: named[1],
                buffer_size_bytes=self._info["packed_buffer_size_bytes"],
                num_buffers=self._info["packed_num_buffers"],
            )

        return produce

    def close(self) -> None:
        """Raises RunError if what is sent cannot be stopped."""
        self._closed = True
        self._lifeline.close()
        self._joined.add_done_callback(_destroy)  # whenever it comes
        if self._sent is not None and futures.wait([self._sent], ABORT_S).not_done:
            raise RunError(f"refit: the broadcast to the engines did not end within {ABORT_S:.0f} s of its abort")


def _destroy(joined: Future) -> None:
    if joined.exception() is None:
        joined.result().destroy()


def made_on(stream: torch.cuda.Stream, tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator:
    """The tensors, made on this stream, behind all that was asked of it before, whichever stream they are read on:
    vLLM's producer reads on streams of its own."""
    while True:
        with torch.cuda.stream(stream):
            named = next(tensors, None)
        if named is None:
            return
        reading = torch.cuda.current_stream()
        reading.wait_stream(stream)
        named[1].record_stream(reading)
        yield named


class SharedSender:
    """Engines on this machine load a bucket from the memory that it was written to. All buckets are one update, and
    bytes on a socket say whose turn it is: a call for each bucket would go through four processes, which on busy cores
    wait for each other."""

    def __init__(self, stream: Stream, world_size: int, timeout_s: float):
        self._lengths, self._bucket_bytes = [len(bucket) for bucket in stream.buckets], stream.bucket_bytes
        self._positions, size = positions(stream.buckets, stream.bucket_bytes)
        self._memory = SharedMemory(size)
        self._num_engine_ranks, self._timeout_s = world_size - 1, timeout_s
        self._listener = listen()
        self._engines: list[socket.socket] = []

    def init_info(self, first_rank: int) -> dict:
        return {
            "path": self._memory.path,
            "lengths": self._lengths,
            "bucket_bytes": self._bucket_bytes,
            "socket": self._listener.getsockname().decode(),
            "timeout_s": self._timeout_s,
        }

    def open(self) -> None:
        pass  # engines join without it: one that cannot says so at once

    def _accept(self) -> None:
        self._listener.settimeout(self._timeout_s)
        while len(self._engines) < self._num_engine_ranks:
            engine, _ = self._listener.accept()
            engine.settimeout(self._timeout_s)
            self._engines.append(engine)

    def send(self, stream: Stream, update: Update) -> None:
        self._accept()
        loaded = 0

        @functools.cache
        def start() -> Callable[[], object]:  # once; the engines pause meanwhile
            return update({}, "loading")

        def until_loaded(num_buckets: int) -> None:
            nonlocal loaded
            while loaded < num_buckets:
                for engine in self._engines:
                    await_turn(engine)
                loaded += 1

        def memory(index: int) -> torch.Tensor:
            if self._positions[index].lasting:  # they may compute with what lies there
                start()
            until_loaded(self._positions[index].after)
            return self._memory.bytes[self._positions[index].offset :]

        try:
            for _ in stream.fill(memory):
                start()
                for engine in self._engines:
                    pass_turn(engine)
            until_loaded(len(stream.buckets))
        except OSError as e:
            stream.at = span(stream.buckets[loaded])  # where the engines are
            raise BrokenWire(str(e)) from e
        wait = start()
        wait()

    def close(self) -> None:
        for end in (self._listener, *self._engines):
            end.close()
        self._memory.close()


class IpcSender:
    """vLLM's own `ipc` backend, packed: engines load from the memory of the trainer rank on their GPU. Collective:
    every trainer rank has one, and fills buckets of its own. torch must not use expandable segments, whose memory has
    no handles."""

    def __init__(self, topology: Topology):
        self._topology = topology

    def init_info(self, first_rank: int) -> dict:
        return {"packed": True}

    def open(self) -> None:
        pass

    def send(self, stream: Stream, update: Update | None) -> None:
        """`update` is the driver's alone. What fails on one rank ends it on all of them, at the same place."""
        self._send(stream, update or (lambda info, what: _nothing))
        # The buffers are gone. No engine takes memory for its cache before every rank has given theirs back.
        collectives.together(self._give_back, self._topology)

    def _send(self, stream: Stream, update: Update) -> None:
        together = functools.partial(collectives.together, topology=self._topology)
        buffers: list[torch.Tensor] = []
        loaded: Callable[..., object] = _nothing

        def allocate() -> None:
            # For this refit alone: an exported buffer is counted until the engines let go of it.
            buffers.extend(self._allocate(stream.capacity_bytes) for _ in range(2))

        def hand_over(buffer: torch.Tensor) -> tuple[str, object]:
            loaded()  # of the bucket before, whose memory is next
            return self._export(buffer)

        def start(bucket: Sequence[TensorInfo], handles: dict) -> None:
            nonlocal loaded
            info = {
                **to_dict(bucket),
                "tensor_sizes": [i.num_bytes for i in bucket],
                "ipc_handles": base64.b64encode(pickle.dumps(handles)).decode(),
            }
            loaded = update(info, f"loading {span(bucket)}")

        def finish() -> None:
            loaded()  # nobody frees its last bucket before

        together(allocate)
        for index, bucket, _ in stream.fill(lambda i: buffers[i % 2]):
            handles = dict(together(functools.partial(hand_over, buffers[index % 2])))
            together(functools.partial(start, bucket, handles))
        together(finish)

    def _allocate(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._topology.device)

    def _export(self, buffer: torch.Tensor) -> tuple[str, object]:
        """(GPU, what its engine finds the buffer by), when all of it is written."""
        torch.cuda.synchronize(self._topology.device)
        return str(torch.cuda.get_device_properties(self._topology.device).uuid), _handle(buffer)

    def _give_back(self) -> None:
        torch.cuda.ipc_collect()
        torch.cuda.empty_cache()

    def close(self) -> None:
        pass


def _nothing() -> None:
    pass


def _handle(buffer: torch.Tensor) -> tuple:
    """Exported anew for each bucket: the engine releases an export each time it maps another one."""
    from torch.multiprocessing.reductions import reduce_tensor

    return reduce_tensor(buffer)[1]
