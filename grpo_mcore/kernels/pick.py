"""Which form of linear_logprob runs: the plain PyTorch one or the Triton one, of the same signature. Triton is imported
once it is picked."""

import functools
import importlib.util
import os
from collections.abc import Callable

import torch

from grpo_mcore.kernels import reference

LinearLogprob = Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def pick(impl: str = "auto", device: torch.device | None = None) -> LinearLogprob:
    """linear_logprob as `impl` has it: "reference", "triton", or "auto": Triton's on CUDA, the reference elsewhere.
    Says so, once.

    device: of the tensors; None: CUDA where there is one. ValueError for what cannot run there.
    """
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return _pick(impl, device.type)


@functools.cache
def _pick(impl: str, device: str) -> LinearLogprob:
    if impl not in ("auto", "reference", "triton"):
        raise ValueError(f"linear_logprob: impl = {impl!r} must be one of auto, reference, triton")
    missing = _what_triton_lacks(device)
    if impl == "triton" and missing:
        raise ValueError(f"linear_logprob: impl = 'triton' cannot run: {missing}. Remedy: impl = auto or reference")
    if impl != "auto":
        chosen, why = impl, "as asked"
    elif device == "cuda" and missing:
        chosen, why = "reference", missing
    else:
        chosen, why = "triton" if device == "cuda" else "reference", f"the tensors are on {device}"
    if os.environ.get("RANK", "0") == "0":
        print(f"kernels: linear_logprob is {chosen}'s ({why})", flush=True)
    if chosen == "reference":
        return reference.linear_logprob
    from grpo_mcore.kernels import linear_logprob

    return linear_logprob.linear_logprob


def _what_triton_lacks(device: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {device} (only Triton's interpreter runs there, for tests: TRITON_INTERPRET=1)"
    if device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        return "it needs a GPU of compute capability 9.0 (Hopper) or newer"
    return None
