"""What a cluster's parts take: seconds of an engine's iteration, of a training step, of a refit; lengths of responses.
For simulate.py.

Measured (benchmarks/rollout.py, a run's metrics and rollouts), or estimated from data sheets as memory.py and time.py
do.
"""

import json
import math
import random
import statistics
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from grpo_mcore.config.config import InputError
from grpo_mcore.plan import memory, time as plan_time
from grpo_mcore.plan.memory import Case
from grpo_mcore.plan.time import Assumptions
from grpo_mcore.report import run_folder


@dataclass(frozen=True)
class EngineProfile:
    """Seconds of one engine."""

    # (running responses, seconds in which each gains a token), ascending; linear between, and beyond by the last slope
    iteration_s: tuple[tuple[int, float], ...]
    kv_token_s: float = 0.0  # an iteration's more, per token in the cache
    prefill_token_s: float = 0.0  # per prompt token computed
    response_s: float = 0.0  # per response that starts
    block_tokens: int = 0  # of the prefix cache; 0: there is none
    kv_cache_tokens: int | None = None  # what it holds; null: enough

    def base_s(self, running: int) -> float:
        """An iteration with an empty cache."""
        points = self.iteration_s
        if len(points) == 1:
            return points[0][1]
        i = min(max(bisect_left(points, (running,)), 1), len(points) - 1)
        (n0, s0), (n1, s1) = points[i - 1], points[i]
        return s0 + (s1 - s0) * (running - n0) / (n1 - n0)

    def decode_s(self, iterations: int, running: int, kv_tokens: int) -> float:
        """That many iterations, of which each leaves `running` tokens more in the cache."""
        return iterations * self.base_s(running) + self.kv_token_s * (
            iterations * kv_tokens + running * (iterations * (iterations - 1) // 2)
        )

    def iterations_within(self, seconds: float, running: int, kv_tokens: int) -> int:
        """How many are over after `seconds`: the inverse of decode_s, which is quadratic in the iterations."""
        if seconds <= 0:
            return 0
        a = self.kv_token_s * running / 2
        b = self.base_s(running) + self.kv_token_s * kv_tokens - a
        estimate = seconds / b if not a else (math.sqrt(b * b + 4 * a * seconds) - b) / (2 * a)
        n = max(int(estimate) - 1, 0)  # it may be rounded up
        while self.decode_s(n + 1, running, kv_tokens) <= seconds:
            n += 1
        return n


@dataclass(frozen=True)
class TrainerProfile:
    """Seconds of all trainers together."""

    step_s: float = 0.0  # of every step
    token_s: float = 0.0  # more, per token of its sequences, prompts included
    token_pair_s: float = 0.0  # more, per square of a sequence's tokens: attention
    refit_s: float = 0.0

    def seconds(self, sequence_tokens: Sequence[int]) -> float:
        return (
            self.step_s + self.token_s * sum(sequence_tokens) + self.token_pair_s * sum(n * n for n in sequence_tokens)
        )


@dataclass(frozen=True)
class Failures:
    mean_s: float  # of one engine's life
    restart_s: float

    def life_s(self, rng: random.Random) -> float:
        return rng.expovariate(1 / self.mean_s)


@dataclass(frozen=True)
class Cluster:
    engine: EngineProfile
    trainer: TrainerProfile
    failures: Failures | None = None


@dataclass(frozen=True)
class Draw:
    """What a prompt will sample."""

    prompt_tokens: int
    response_tokens: tuple[int, ...]
    has_variance: bool = True  # of the rewards


def _nothing_in(run_dir: str | Path, what: str) -> InputError:
    return InputError("--like", str(run_dir), what, "name the folder of a run that has trained at least one step")


# Lengths: position in the stream -> Draw.


class Measured:
    """The groups of a run in their order, over and over."""

    def __init__(self, run_dir: str | Path):
        """Reads RUN/rollouts/*.jsonl. Raises InputError if there are none."""
        groups: dict[int, list[dict[str, Any]]] = {}
        for path in sorted(Path(run_dir).glob("rollouts/step_*.jsonl")):
            for line in path.read_text().splitlines():
                row = json.loads(line)
                groups.setdefault(row["position"], []).append(row)
        if not groups:
            raise _nothing_in(run_dir, "has no rollouts/step_*.jsonl")
        self.draws = [self._draw(rows) for _, rows in sorted(groups.items())]

    @staticmethod
    def _draw(rows: list[dict[str, Any]]) -> Draw:
        has_variance = len({r["reward"] for r in rows}) > 1
        return Draw(rows[0]["prompt_tokens"], tuple(r["response_tokens"] for r in rows), has_variance)

    def __call__(self, position: int) -> Draw:
        return self.draws[position % len(self.draws)]


@dataclass(frozen=True)
class LogNormal:
    """Independent lengths, cut at the limit. Some groups have no variance in their rewards, whatever their lengths."""

    median_tokens: float
    mean_tokens: float  # without the limit
    max_tokens: int
    prompt_tokens: int
    group_size: int
    flat_frac: float = 0.0  # groups without variance
    seed: int = 0

    def __call__(self, position: int) -> Draw:
        rng = random.Random(f"{self.seed}/{position}")
        sigma = math.sqrt(2 * math.log(self.mean_tokens / self.median_tokens))
        lengths = (rng.lognormvariate(math.log(self.median_tokens), sigma) for _ in range(self.group_size))
        return Draw(
            self.prompt_tokens,
            tuple(min(max(round(n), 1), self.max_tokens) for n in lengths),
            rng.random() >= self.flat_frac,
        )


# Measured seconds.


def engine_from(path: str | Path) -> EngineProfile:
    """The profile that benchmarks/rollout.py wrote. Raises InputError."""
    try:
        p = json.loads(Path(path).read_text())["profile"]
        iteration_s = tuple((int(n), s) for n, s in p["iteration_s"])
        return EngineProfile(iteration_s, *(p[field.name] for field in fields(EngineProfile)[1:]))
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(
            "--profile",
            str(path),
            f"is no profile ({type(e).__name__}: {e})",
            "name a file that benchmarks/rollout.py wrote",
        ) from e


@dataclass(frozen=True)
class MeasuredStep:
    """Of a run; evaluations left out."""

    refit_s: float
    rollout_s: float
    train_s: float  # all the rest that was timed
    tokens: int  # of its sequences, prompts included

    @property
    def seconds(self) -> float:
        return self.refit_s + self.rollout_s + self.train_s


def measured_steps(run_dir: str | Path) -> list[MeasuredStep]:
    """From RUN/metrics.jsonl and RUN/rollouts. Raises InputError."""
    out = []
    for row in run_folder.read_metrics(run_dir):
        path = Path(run_dir) / "rollouts" / f"step_{row['step']:06d}.jsonl"
        if "time/rollout_s" not in row or not path.is_file():
            continue
        responses = map(json.loads, path.read_text().splitlines())
        tokens = sum(r["prompt_tokens"] + r["response_tokens"] for r in responses)
        seconds = {name: s for name, s in row.items() if name.startswith("time/") and name != "time/eval_s"}
        refit_s, rollout_s = seconds.pop("time/refit_s"), seconds.pop("time/rollout_s")
        out.append(MeasuredStep(refit_s, rollout_s, sum(seconds.values()), tokens))
    if not out:
        raise _nothing_in(run_dir, "has no step with its seconds (metrics.jsonl) and its responses (rollouts)")
    return out


def counted(steps: Sequence[MeasuredStep]) -> Sequence[MeasuredStep]:
    """Without the first, which warms up, if there are others."""
    return steps[1:] or steps


def trainer_of(steps: Sequence[MeasuredStep]) -> TrainerProfile:
    """Seconds per token, and the mean refit."""
    return TrainerProfile(
        token_s=sum(s.train_s for s in steps) / sum(s.tokens for s in steps),
        refit_s=statistics.mean(s.refit_s for s in steps),
    )


# Estimates, with memory.py's GPUs and time.py's assumptions.

RUNNING = tuple(1 << i for i in range(13))  # responses of an engine, at which its iteration is estimated
BLOCK_TOKENS = 16  # vLLM's on a GPU


def estimated(case: Case, a: Assumptions) -> Cluster:
    e, seconds = plan_time.decoding(case, a), plan_time.times(case, a)
    engine = EngineProfile(
        tuple((n, e.fixed_s + max(e.weights_s, n * e.token_s)) for n in RUNNING),
        kv_token_s=e.kv_token_s,
        prefill_token_s=e.token_s,
        block_tokens=BLOCK_TOKENS if case.cfg.engine.prefix_caching else 0,
        kv_cache_tokens=int(memory.kv_cache_tokens(case)),
    )
    # As the assumed step's, by the FLOPs of a sequence; every token a response token.
    hf = case.hf_config
    linear, (_, pairs) = sum(plan_time.forward_flops(hf, 1, 1)), plan_time.forward_flops(hf, 1, 0)
    linear -= pairs
    of_sequence = (seconds["logprob"] + seconds["update"]) / case.cfg.responses_per_step
    per_flop = of_sequence / (linear * a.tokens + pairs * a.tokens**2)
    return Cluster(
        engine, TrainerProfile(token_s=linear * per_flop, token_pair_s=pairs * per_flop, refit_s=seconds["refit"])
    )
