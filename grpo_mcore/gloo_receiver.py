"""vLLM's side of the gloo weight transfer. Importing this module registers the backend `gloo`.

vLLM imports it in each worker process, as the module of `WorkerExtension`; it must stay light.
"""

from dataclasses import dataclass, field

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from grpo_mcore.weight_transfer import TensorInfo, broadcast_gloo, buckets, open_gloo, unpack


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    master_address: str
    master_port: int
    rank_offset: int  # rank of this engine's first worker in the transfer group
    world_size: int
    bucket_bytes: int
    timeout_s: float


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    names: list[str] = field(default_factory=list)
    dtype_names: list[str] = field(default_factory=list)
    shapes: list[list[int]] = field(default_factory=list)


class GlooReceiver(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        self._bucket_bytes = init_info.bucket_bytes
        self._group = open_gloo(
            init_info.master_address, init_info.master_port, init_info.rank_offset + self.parallel_config.rank,
            init_info.world_size, init_info.timeout_s)

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        infos = [
            TensorInfo(name, getattr(torch, dtype), tuple(shape))
            for name, dtype, shape in zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True)
        ]
        for bucket in buckets(infos, self._bucket_bytes):
            buffer = torch.empty(sum(i.num_bytes for i in bucket), dtype=torch.uint8)
            broadcast_gloo(self._group, buffer)
            self.model.load_weights(unpack(buffer, bucket))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        for module in self.model.modules():
            # A CPU worker multiplies with its own packed copy of the head, which the reload of a tied embedding
            # does not renew.
            if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
                module.quant_method.process_weights_after_loading(module)

    def shutdown(self) -> None:
        self._group = None


class WorkerExtension:
    """Named in worker_extension_cls for its module's sake."""


WeightTransferEngineFactory.register_engine("gloo", GlooReceiver)
