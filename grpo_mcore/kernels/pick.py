"""Kernels, each in a plain PyTorch form and a Triton one of the same signature. Triton is imported once it is
picked."""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable

import torch

NAMES = ("linear_logprob", "logprob")


def pick(name: str, impl: str = "auto", device: torch.device | None = None) -> Callable:
    """The function `name`, as `impl` has it: "reference", "triton", or "auto": Triton's on CUDA, the reference
    elsewhere. Says so, once.

    device: of the tensors; None: CUDA where there is one. ValueError for what cannot run there.
    """
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return _pick(name, impl, device.type)


@functools.cache
def _pick(name: str, impl: str, device: str) -> Callable:
    if name not in NAMES:
        raise ValueError(f"kernel {name!r}: must be one of {', '.join(NAMES)}")
    if impl not in ("auto", "reference", "triton"):
        raise ValueError(f"{name}: impl = {impl!r} must be one of auto, reference, triton")
    missing = _what_triton_lacks(device)
    if impl == "triton" and missing:
        raise ValueError(f"{name}: impl = 'triton' cannot run: {missing}. Remedy: impl = auto or reference")
    if impl != "auto":
        chosen, why = impl, "as asked"
    elif device != "cuda":
        chosen, why = "reference", f"the tensors are on {device}"
    else:
        chosen, why = ("reference", missing) if missing else ("triton", "the tensors are on cuda")
    if os.environ.get("RANK", "0") == "0":
        print(f"kernels: {name} is {chosen}'s ({why})", flush=True)
    module = importlib.import_module(f"grpo_mcore.kernels.{'reference' if chosen == 'reference' else name}")
    return getattr(module, name)


def _what_triton_lacks(device: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {device} (only Triton's interpreter runs there, for tests: TRITON_INTERPRET=1)"
    if device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        return "it needs a GPU of compute capability 9.0 (Hopper) or newer"
    return None
