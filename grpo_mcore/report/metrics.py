"""Metrics that declare how they are reduced; how far the engines' log-probs are from the trainer's."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, Self, TypeVar

import torch

from grpo_mcore.config import config


@dataclass(frozen=True)
class Mean:
    """Sum of values and how many they were; merging is exact whatever the parts."""

    total: float
    count: float

    @classmethod
    def of(cls, values: torch.Tensor) -> "Mean":
        return cls(values.double().sum().item(), values.numel())

    def merge(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else 0.0


@dataclass(frozen=True)
class Max:
    value: float

    @classmethod
    def of(cls, values: torch.Tensor) -> "Max":
        return cls(values.max().item() if values.numel() else -math.inf)

    def merge(self, other: "Max") -> "Max":
        return self if self.value >= other.value or math.isnan(self.value) else other  # NaN wins


@dataclass(frozen=True)
class Sum:
    value: float

    def merge(self, other: "Sum") -> "Sum":
        return Sum(self.value + other.value)


@dataclass(frozen=True)
class EffectiveFraction:
    """Kish's effective sample size of weights, (sum w)^2 / sum w^2, over their number: 1 if all are equal, 1/n if one
    has it all."""

    total: float
    squares: float
    count: float

    @classmethod
    def of(cls, weights: torch.Tensor) -> "EffectiveFraction":
        w = weights.double()
        return cls(w.sum().item(), w.square().sum().item(), w.numel())

    def merge(self, other: "EffectiveFraction") -> "EffectiveFraction":
        return EffectiveFraction(self.total + other.total, self.squares + other.squares, self.count + other.count)

    @property
    def value(self) -> float:
        return self.total**2 / (self.count * self.squares) if self.squares else 0.0


class Metric(Protocol):
    """Its type is how it is reduced."""

    @property
    def value(self) -> float: ...

    def merge(self, other: Self) -> Self: ...


M = TypeVar("M", bound=Metric)


def merge(parts: Sequence[Mapping[str, M]]) -> dict[str, M]:
    """One dict of the parts of microbatches, optimizer steps or ranks."""
    out: dict[str, M] = {}
    for part in parts:
        for name, metric in part.items():
            out[name] = out[name].merge(metric) if name in out else metric
    return out


class MismatchError(config.RunError):
    """The engines sample with another distribution than the trainer scores."""


POSITIONS = (0, 256, 1024, 4096, 16384)  # tokens into a sequence at which buckets of mismatch begin


def mismatch(
    rollout_logprobs_R: torch.Tensor, old_logprobs_R: torch.Tensor, position_R: torch.Tensor, cap: float = 2.0
) -> dict[str, Metric]:
    """What the engine sampled with against what the trainer scores: log-prob differences, also by position in the
    sequence, the share of tokens whose importance weight exp(old - rollout) exceeds `cap`, and k3 of KL(rollout ||
    old)."""
    d = old_logprobs_R - rollout_logprobs_R
    out: dict[str, Metric] = {
        "mismatch/logprob_abs_mean": Mean.of(d.abs()),
        "mismatch/logprob_abs_max": Max.of(d.abs()),
        "mismatch/beyond_cap_frac": Mean.of((d.exp() > cap).float()),
        "mismatch/k3": Mean.of(d.clamp(-20, 20).expm1() - d.clamp(-20, 20)),
    }
    for start, end in pairwise((*POSITIONS, math.inf)):
        inside = (position_R >= start) & (position_R < end)
        if inside.any():
            out[f"mismatch/logprob_abs_mean_from_{start}"] = Mean.of(d[inside].abs())
    return out


def check_mismatch(merged: dict[str, Metric], bounds: config.Mismatch, *, speaks: bool) -> None:
    """Raises MismatchError above the bound to stop at; says so (the rank that `speaks`) above the bound to warn at."""
    seen = merged["mismatch/logprob_abs_mean"].value
    what = (
        f"mean |old - rollout| log-prob is {seen:.3g}: the engines sample with another distribution than the "
        f"trainer scores"
    )
    advice = (
        "See mismatch/* by position: a rise with length points to the engines' precision or kernels "
        "(engine.dtype, quantization, enforce_eager, kv_cache_dtype)"
    )
    if bounds.stop_above is not None and not seen <= bounds.stop_above:  # NaN stops too
        raise MismatchError(
            f"{what}; mismatch.stop_above = {bounds.stop_above:g}. {advice}; loss.importance_level corrects for it."
        )
    if bounds.warn_above is not None and not seen <= bounds.warn_above and speaks:
        print(f"warning: {what}; mismatch.warn_above = {bounds.warn_above:g}. {advice}", flush=True)


def importance(importance_R: torch.Tensor, beyond_R: torch.Tensor) -> dict[str, Metric]:
    """The importance correction's weights as the loss takes them, token by token, and the share that the cap
    changed."""
    return {
        "importance/weight_mean": Mean.of(importance_R),
        "importance/beyond_cap_frac": Mean.of(beyond_R.float()),
        "importance/effective_frac": EffectiveFraction.of(importance_R),
    }
