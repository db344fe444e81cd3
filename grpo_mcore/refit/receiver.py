"""vLLM's side of the weight transfer. Importing this module registers the backend `grpo_mcore`.

vLLM imports it in each worker process, as the module of `WorkerExtension`; it must stay light. One backend for all
transports, so that the trainer can choose when it has seen where the engines are; NCCL and IPC are vLLM's own backends
behind it.
"""

import base64
import ctypes
import dataclasses
import pickle
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.platforms import current_platform

from grpo_mcore.refit.live_weights import LiveWeights, Loads
from grpo_mcore.refit.weight_transfer import (
    Lifeline,
    TensorInfo,
    await_turn,
    cut,
    from_dict,
    in_thread,
    join,
    num_bytes,
    open_gloo,
    open_shared,
    pass_turn,
    positions,
    start_broadcast,
    unpack,
)

BACKEND = "grpo_mcore"


@dataclass
class InitInfo(WeightTransferInitInfo):
    transport: str  # gloo, shared_memory, nccl, ipc
    weights: dict  # names, dtype_names, shapes of all that an update sends, in order
    info: dict  # the transport's own


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    info: dict


class Receiver(WeightTransferEngine[InitInfo, UpdateInfo]):
    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    _reloading = False  # layerwise
    _wire: "Wire"  # from init_transfer_engine to shutdown

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        self.shutdown()  # of the wire before
        if current_platform.is_cpu():
            keep_freed_memory()
        infos = from_dict(init_info.weights)
        self._live = LiveWeights.of(self.model, infos) if self.parallel_config.world_size == 1 else None
        arguments = infos, init_info.info
        if init_info.transport == "gloo":
            self._wire = Gloo(*arguments, self.parallel_config.rank)
        elif init_info.transport == "shared_memory":
            self._wire = shared = Shared(*arguments, reused=self._live is None)
            if self._live:
                self._live.lasting = shared.lasting
        elif init_info.transport == "nccl":
            self._wire = Nccl(init_info.info, self)
        else:
            self._wire = Ipc(init_info.info, self)

    def start_weight_update(self) -> None:
        if self._live:
            self._live.begin()
            return
        if self._reloading:  # an update that was given up; layers that it began would take what comes now for the rest
            finalize_layerwise_reload(self.model, self.model_config)
        self._reloading = True
        initialize_layerwise_reload(self.model)

    @property
    def target(self) -> Loads:
        return self._live or self.model

    def receive_weights(self, update_info: UpdateInfo) -> None:
        try:
            for weights in self._wire.receive(update_info.info):
                self.target.load_weights(weights)
        except BaseException:
            self._wire.abort()
            raise

    def finish_weight_update(self) -> None:
        if self._live:
            self._live.end()
            return
        check_complete(self.model)
        finalize_layerwise_reload(self.model, self.model_config)
        self._reloading = False
        for module in self.model.modules():
            # A CPU worker multiplies with its own packed copy of the head, which the reload of a tied embedding
            # does not renew.
            if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
                module.quant_method.process_weights_after_loading(module)

    def shutdown(self) -> None:
        if hasattr(self, "_wire"):
            self._wire.abort()
            del self._wire

    @staticmethod
    def trainer_send_weights(*args, **kwargs) -> None:
        """Abstract in vllm 0.26. The sender is ours."""
        raise NotImplementedError


def check_complete(model: torch.nn.Module) -> None:
    """Before a layerwise reload ends, which would let a layer that got nothing keep its old weights. Raises
    RuntimeError."""

    def live(module) -> set[int]:  # its parameters when no reload is on
        return {id(p) for p in (get_layerwise_info(module).kernel_tensors or [module._parameters])[0].values()}

    elsewhere = {i for m in model.modules() if not isinstance(m, ParallelLMHead) for i in live(m)}
    for name, module in model.named_modules():
        info = get_layerwise_info(module)
        parameters = [p for p in module._parameters.values() if p is not None]
        if not parameters or not info.can_load() or isinstance(module, (Attention, MLAAttention)):
            continue
        if isinstance(module, ParallelLMHead) and live(module) <= elsewhere:  # tied
            continue
        # The rows that pad a vocabulary never come.
        expected = 1 if isinstance(module, VocabParallelEmbedding) else sum(p.numel() for p in parameters)
        if info.load_numel < expected:
            raise RuntimeError(f"{name} received {info.load_numel} of {expected} elements")


def keep_freed_memory() -> None:
    """Of a CPU engine, which packs all its weights anew in each refit: pages given back to the system would be touched
    anew each time, which takes as long as the packing. Where the C library has no mallopt, nothing changes."""
    trim_threshold, mmap_max = -1, -4  # malloc.h
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


class Wire(Protocol):
    def receive(self, info: dict) -> Iterator[list[tuple[str, torch.Tensor]]]:
        """The weights that arrive here, some at a time; each must be loaded before the next is asked for."""

    def abort(self) -> None: ...


class Gloo:
    """A broadcast of all buckets in one update; the next one arrives while one is loaded."""

    def __init__(self, infos: list[TensorInfo], info: dict, rank: int):
        self._infos = infos
        self._group = open_gloo(
            info["address"], info["port"], info["first_rank"] + rank, info["world_size"], info["timeout_s"]
        )

    def receive(self, info: dict) -> Iterator[list[tuple[str, torch.Tensor]]]:
        def start(bucket):
            buffer = torch.empty(num_bytes(bucket), dtype=torch.uint8)
            return bucket, buffer, start_broadcast(self._group, buffer)

        waiting = cut(self._infos, info["lengths"])
        following = start(waiting.pop(0))
        while following:
            bucket, buffer, arrival = following
            arrival.wait()
            following = start(waiting.pop(0)) if waiting else None
            yield unpack(buffer, bucket)

    def abort(self) -> None:
        """The sender learns it at once, and not when its time is up."""
        self._group.abort()


class Shared:
    """All buckets in one update, where the sender writes them."""

    def __init__(self, infos: list[TensorInfo], info: dict, *, reused: bool):
        """`reused`: what is loaded keeps tensors beyond their bucket, in which the sender writes over them."""
        self._reused, self._buckets = reused, cut(infos, info["lengths"])
        self._positions, size = positions(self._buckets, info["bucket_bytes"])
        self._memory = open_shared(info["path"], size)
        self._sender = join(info["socket"], info["timeout_s"])

    @property
    def lasting(self) -> set[str]:
        """Names of tensors that nobody writes over before the next refit."""
        return {
            i.name
            for bucket, position in zip(self._buckets, self._positions, strict=True)
            if position.lasting
            for i in bucket
        }

    def receive(self, info: dict) -> Iterator[list[tuple[str, torch.Tensor]]]:
        for bucket, position in zip(self._buckets, self._positions, strict=True):
            await_turn(self._sender)
            buffer = self._memory[position.offset :][: num_bytes(bucket)]
            yield unpack(buffer.clone() if self._reused else buffer, bucket)
            pass_turn(self._sender)

    def abort(self) -> None:
        """The sender learns it at once, and not when its time is up."""
        self._sender.close()


def of_joining(engine: type[WeightTransferEngine] | WeightTransferEngine, info: dict) -> tuple[dict, dict]:
    """(what vLLM's engine wants to know once, what it wants to know with each update): what the sender packs by is the
    latter in vllm 0.26."""
    once = {field.name for field in dataclasses.fields(engine.init_info_cls)}
    return {k: v for k, v in info.items() if k in once}, {k: v for k, v in info.items() if k not in once}


class Vllms:
    """vLLM's own backend for the wire, loading into what ours loads into."""

    def __init__(self, name: str, info: dict, receiver: Receiver):
        self._engine = WeightTransferEngineFactory.create_engine(
            WeightTransferConfig(backend=name), receiver.vllm_config, receiver.device, receiver.target
        )
        of_init, self._of_updates = of_joining(self._engine, info)
        self._join(self._engine.parse_init_info(of_init))

    def _join(self, init_info: WeightTransferInitInfo) -> None:
        self._engine.init_transfer_engine(init_info)

    def receive(self, info: dict) -> Iterator[list[tuple[str, torch.Tensor]]]:
        self._engine.receive_weights(self._engine.parse_update_info({**self._of_updates, **info}))
        yield from ()

    def abort(self) -> None:
        self._engine.shutdown()


class Ipc(Vllms):
    def __init__(self, info: dict, receiver: Receiver):
        super().__init__("ipc", info, receiver)

    def receive(self, info: dict) -> Iterator[list[tuple[str, torch.Tensor]]]:
        # CUDA's handles are objects that vLLM's messages do not carry.
        yield from super().receive({**info, "ipc_handles": pickle.loads(base64.b64decode(info["ipc_handles"]))})
        self._engine.shutdown()  # lets go of the sender's buffer; the next update maps its own


class Nccl(Vllms):
    """NCCL waits in C for whoever is missing, for ever: until the sender's end of the lifeline is gone."""

    def __init__(self, info: dict, receiver: Receiver):
        info = dict(info)
        self._lifeline, self._device = Lifeline(info.pop("lifeline"), info.pop("timeout_s")), receiver.device
        super().__init__("nccl", info, receiver)

    def _join(self, init_info: WeightTransferInitInfo) -> None:
        # In a thread: there is no communicator to abort yet.
        self._lifeline.unless_gone(in_thread(lambda: self._engine.init_transfer_engine(init_info), self._device))
        self._lifeline.when_gone(self.abort)

    def receive(self, info: dict) -> Iterator[list[tuple[str, torch.Tensor]]]:
        yield from super().receive(info)
        if self._lifeline.is_gone:  # a broadcast that was aborted returns as if all had come
            raise ConnectionError("the sender gave up, or is gone")

    def abort(self) -> None:
        self._lifeline.close()
        if communicator := self._engine.model_update_group:
            communicator.destroy()  # in vllm 0.26 the engine's shutdown only forgets it


class WorkerExtension:
    """Named in worker_extension_cls: its methods become the worker's."""

    device: torch.device  # the worker's own, as the next
    start_weight_update: Callable[[], None]

    def begin_weight_update(self) -> None:
        """start_weight_update, also after an update that was never finished, as when another engine failed in it."""
        self._weight_update_active = False
        self.start_weight_update()

    def place(self) -> list[str]:
        """[host, GPU's UUID or ""]"""
        return [
            socket.gethostname(),
            str(torch.cuda.get_device_properties(self.device).uuid) if torch.cuda.is_available() else "",
        ]


WeightTransferEngineFactory.register_engine(BACKEND, Receiver)
