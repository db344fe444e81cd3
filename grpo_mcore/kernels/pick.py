"""Which form of the head runs: the plain PyTorch one or the Triton one, of the same signature, and whether an update
computes its logits once (linear_grpo) or twice (linear_logprob). Triton is imported once it is picked."""

import functools
import importlib.util
import os
from collections.abc import Callable

import torch

from grpo_mcore.kernels import linear_grpo, reference

# Of Triton's linear_logprob, by default; here, for plan counts it without Triton.
WORKSPACE_BYTES = 512 << 20

LinearLogprob = Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
LinearGrpo = Callable[..., tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]]


def pick(impl: str = "auto", device: torch.device | None = None, workspace_bytes: int | None = None) -> LinearLogprob:
    """linear_logprob as `impl` has it: "reference", "triton", or "auto": Triton's on CUDA, the reference elsewhere.
    Says so, once.

    device: of the tensors; None: CUDA where there is one. workspace_bytes: Triton's, None: its own default; the
    reference takes less. ValueError for what cannot run there.
    """
    if _pick(impl, _type(device)) == "reference":
        return reference.linear_logprob
    from grpo_mcore.kernels import linear_logprob

    if workspace_bytes is None:
        return linear_logprob.linear_logprob
    return functools.partial(linear_logprob.linear_logprob, workspace_bytes=workspace_bytes)


def pick_grpo(
    impl: str = "auto",
    device: torch.device | None = None,
    workspace_bytes: int | None = None,
    *,
    wanted: bool,
    pointwise: bool,
) -> LinearGrpo | None:
    """linear_grpo for a policy's updates, and for its scoring, so that both have the same log-probs bit for bit; None:
    linear_logprob. Says which and why, once.

    impl: of its passes over logits, as in `pick`; products are the library's. wanted: kernels.linear_grpo. pointwise:
    whether each token's part of the loss needs its own log-prob and entropy alone. workspace_bytes: of a chunk's
    logits; None: the default. ValueError for what cannot run there.
    """
    why_not = {
        "kernels.linear_grpo = false": not wanted,
        "the loss of a token needs its whole response, as gspo's does": not pointwise,
    }
    reasons = [why for why, holds in why_not.items() if holds]
    _say(f"an update computes its logits {f'twice ({reasons[0]})' if reasons else 'once (linear_grpo)'}")
    if reasons:
        return None
    kept: type[linear_grpo.Logits] = linear_grpo.Logits
    if _pick(impl, _type(device), "linear_grpo") == "triton":
        from grpo_mcore.kernels.linear_grpo_triton import TritonLogits

        kept = TritonLogits
    return functools.partial(linear_grpo.linear_grpo, logits=kept, workspace_bytes=workspace_bytes)


@functools.cache
def _say(what: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"kernels: {what}", flush=True)


def _type(device: torch.device | None) -> str:
    return device.type if device is not None else "cuda" if torch.cuda.is_available() else "cpu"


def _pick(impl: str, device: str, function: str = "linear_logprob") -> str:
    """triton or reference"""
    if impl not in ("auto", "reference", "triton"):
        raise ValueError(f"{function}: impl = {impl!r} must be one of auto, reference, triton")
    missing = _what_triton_lacks(device)
    if impl == "triton" and missing:
        raise ValueError(f"{function}: impl = 'triton' cannot run: {missing}. Remedy: impl = auto or reference")
    if impl != "auto":
        chosen, why = impl, "as asked"
    elif device == "cuda" and missing:
        chosen, why = "reference", missing
    else:
        chosen, why = "triton" if device == "cuda" else "reference", f"the tensors are on {device}"
    _say(f"{function} is {chosen}'s ({why})")
    return chosen


@functools.cache
def _what_triton_lacks(device: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {device} (only Triton's interpreter runs there, for tests: TRITON_INTERPRET=1)"
    if device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        return "it needs a GPU of compute capability 9.0 (Hopper) or newer"
    return None
