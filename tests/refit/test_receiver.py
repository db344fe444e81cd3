"""The engines' end of the weight transfer.

Not covered here: what engines make of it (test_refit.py), NCCL and CUDA IPC themselves.
"""

import inspect

import pytest
import torch

from grpo_mcore.refit.senders import IpcSender, NcclSender
from grpo_mcore.refit.weight_transfer import TensorInfo, to_dict

INFOS = [TensorInfo("a", torch.bfloat16, (2, 3))]


def test_vllm_can_make_a_receiver():
    from grpo_mcore.refit.receiver import Receiver

    assert not inspect.isabstract(Receiver)


@pytest.mark.parametrize("name", ["nccl", "ipc"])
def test_what_the_sender_packs_by_reaches_vllms_backend(name):
    """In vllm 0.32 as it joins, in 0.26 with each update."""
    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

    from grpo_mcore.refit.receiver import of_joining

    engine = NCCLWeightTransferEngine if name == "nccl" else IPCWeightTransferEngine
    sender = NcclSender(4096, "127.0.0.1", 3, 10.0, torch.device("cpu")) if name == "nccl" else IpcSender(None)
    info = {k: v for k, v in sender.init_info(1).items() if k not in ("lifeline", "timeout_s")}
    once, each = of_joining(engine, info)
    ipc = {"tensor_sizes": [12], "ipc_handles": {"gpu": ()}} if name == "ipc" else {}
    joined, update = engine.init_info_cls(**once), engine.update_info_cls(**each, **to_dict(INFOS), **ipc)
    told = vars(joined) | vars(update)
    assert {key: told[key] for key in info} == info and info["packed"]
