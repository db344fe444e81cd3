"""What Megatron-Core needs to run without CUDA. `install()` does nothing where CUDA exists.

Megatron asks torch.cuda for a device, a stream and a generator, writes device="cuda" into tensor factories, and
compares tensor type strings. Each patch below answers one of these with the CPU's counterpart, as narrowly as it can:
torch's own factories stay untouched (patching them breaks `with torch.device("meta")`, and with it
transformers' from_pretrained, silently), so Megatron's modules get a stand-in for the name `torch` instead.
"""

import functools
import importlib
import types

import torch
from torch.optim.adam import adam as adamw

# Megatron's modules that pass the literal device="cuda" to a tensor factory, in 0.16.1 to 0.19.
_MODULES_WITH_CUDA_LITERALS = """
utils optimizer.optimizer optimizer.clip_grads pipeline_parallel.schedules transformer.utils tensor_parallel.data
dist_checkpointing.exchange_utils models.common.embeddings.rope_utils dist_checkpointing.strategies.state_dict_saver
""".split()
_FACTORIES = "tensor zeros ones empty empty_like".split()


class _TorchOnCpu(types.ModuleType):
    """`torch` with factories that put device="cuda" on the CPU."""

    def __getattr__(self, name: str):
        return getattr(torch, name)


class _NullStream:
    def __init__(self, *args, **kwargs):
        pass

    synchronize = wait_stream = wait_event = __init__


def _on_cpu(factory):
    @functools.wraps(factory)
    def on_cpu(*args, **kwargs):
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return on_cpu


class Adam(torch.optim.Optimizer):
    """AdamW that counts its steps in the parameter group, as Transformer Engine's does.

    Megatron's sharded optimizer saves and loads that layout; with torch's AdamW, which keeps one `step` tensor a
    parameter, a resumed run silently shares one counter among all of them.
    """

    def __init__(self, params, lr, betas, eps, weight_decay, adam_w_mode=True, capturable=False):
        """`capturable`, by CUDA graphs, says nothing here."""
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.decoupled = adam_w_mode

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            parameters = [p for p in group["params"] if p.grad is not None]
            for p in parameters:
                if not self.state[p]:
                    self.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            adamw(
                parameters,
                [p.grad for p in parameters],
                [self.state[p]["exp_avg"] for p in parameters],
                [self.state[p]["exp_avg_sq"] for p in parameters],
                [],
                [torch.tensor(float(group["step"] - 1)) for _ in parameters],
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
                decoupled_weight_decay=self.decoupled,
            )


@functools.cache
def install() -> None:
    """Patch once per process, before anything of Megatron is built."""
    if torch.cuda.is_available():
        return
    torch.cuda.current_device = functools.partial(torch.device, "cpu")
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.cuda.current_stream = lambda *args, **kwargs: _NullStream()

    # One generator: what Megatron calls the CUDA generator is the CPU's default one.
    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)

    stand_in = _TorchOnCpu("torch")
    for name in _FACTORIES:
        setattr(stand_in, name, _on_cpu(getattr(torch, name)))
    for name in _MODULES_WITH_CUDA_LITERALS:
        importlib.import_module(f"megatron.core.{name}").torch = stand_in

    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    type_of = torch._C.TensorBase.type

    def type_as_cuda(self, *args, **kwargs):
        # Megatron's optimizers sort parameters by comparing this string with "torch.cuda.FloatTensor".
        out = type_of(self, *args, **kwargs)
        return out.replace("torch.", "torch.cuda.", 1) if isinstance(out, str) else out

    torch.Tensor.type = type_as_cuda

    # Where Transformer Engine is installed, Megatron takes its kernels, device or no device.
    plain = importlib.import_module("megatron.core.utils")
    for name in ("clip_grads", "optimizer"):
        module = importlib.import_module(f"megatron.core.optimizer.{name}")
        module.multi_tensor_applier = plain.local_multi_tensor_applier
        module.multi_tensor_scale_impl = plain.local_multi_tensor_scale
        module.l2_norm_impl = plain.local_multi_tensor_l2_norm
        module.multi_tensor_scale_tensor_impl = None
    optimizer = importlib.import_module("megatron.core.optimizer")
    sharded = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER = Adam, False
    sharded.Adam, sharded.HAVE_APEX_OR_TE, sharded.USING_TE_OPTIMIZER = Adam, True, True
