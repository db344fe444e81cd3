"""Metrics that declare how they are reduced, phase timers, and where both go: JSONL, TensorBoard, the console."""

import contextlib
import json
import math
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from grpo_mcore.config import config
from grpo_mcore.report.run_folder import read_metrics as read


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


Metric = Mean | Max | Sum | EffectiveFraction


def merge(parts: list[dict[str, Metric]]) -> dict[str, Metric]:
    """One dict of the parts of microbatches, optimizer steps or ranks."""
    out: dict[str, Metric] = {}
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
    out = {
        "mismatch/logprob_abs_mean": Mean.of(d.abs()),
        "mismatch/logprob_abs_max": Max.of(d.abs()),
        "mismatch/beyond_cap_frac": Mean.of((d.exp() > cap).float()),
        "mismatch/k3": Mean.of(d.clamp(-20, 20).expm1() - d.clamp(-20, 20)),
    }
    for start, end in zip(POSITIONS, (*POSITIONS[1:], math.inf)):
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


class Timer:
    """Seconds by phase within a step, and which phase is running."""

    def __init__(self, on_phase=lambda phase: None):
        self._on_phase = on_phase
        self.seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, phase: str):
        start = time.perf_counter()
        self._on_phase(phase)
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - start

    def drain(self) -> dict[str, float]:
        """The seconds since the last call, and starts anew."""
        out = {f"time/{phase}_s": s for phase, s in self.seconds.items()}
        self.seconds.clear()
        return out


class Writer:
    """Rows of metrics to RUN/metrics.jsonl, RUN/tensorboard and the console. Only the driver makes one.

    Resuming at `start` drops the rows of later steps, which will be made again.
    """

    def __init__(self, run_dir: str | Path, *, start: int, num_steps: int):
        from torch.utils.tensorboard import SummaryWriter

        self.path = Path(run_dir) / "metrics.jsonl"
        kept = [row for row in read(run_dir) if row["step"] < start or (row["step"] == start and not _is_eval(row))]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self._board = SummaryWriter(str(Path(run_dir) / "tensorboard"), purge_step=start + 1)
        self._start, self._num_steps, self._began = start, num_steps, time.monotonic()
        self._live = sys.stderr.isatty()

    def phase(self, name: str) -> None:
        """Shows the running phase where the console can overwrite a line."""
        if self._live:
            print(f"\r\033[K{name} ...", end="", file=sys.stderr, flush=True)

    def write(self, step: int, row: dict[str, float]) -> None:
        """One row: to be called once per step, and once per evaluation."""
        with self.path.open("a") as f:
            f.write(json.dumps({"step": step, **row}) + "\n")
        for name, value in row.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()

    def write_rollouts(self, step: int, rows: Iterable[dict]) -> None:
        """RUN/rollouts/step_000001.jsonl: what was sampled for the step."""
        path = self.path.parent / "rollouts" / f"step_{step:06d}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def show(self, step: int, row: dict[str, float]) -> None:
        done = step - self._start
        left_s = (time.monotonic() - self._began) / max(done, 1) * (self._num_steps - step)
        phases = " ".join(
            f"{k.removeprefix('time/').removesuffix('_s')} {v:.2f}s"
            for k, v in row.items()
            if k.startswith("time/") and k != "time/step_s"
        )
        self.say(
            f"step {step}/{self._num_steps} | reward {row['reward/mean']:.3f} | {row['tokens_per_s']:.0f} tokens/s "
            f"| {phases} | left {left_s / 60:.1f} min"
        )

    def say(self, text: str) -> None:
        if self._live:
            print("\r\033[K", end="", file=sys.stderr)
        print(text[: shutil.get_terminal_size((200, 24)).columns] if self._live else text, flush=True)

    def close(self) -> None:
        self._board.close()


def _is_eval(row: dict) -> bool:
    return any(name.startswith("eval/") for name in row)
