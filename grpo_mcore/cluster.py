"""What a cluster's parts take: seconds of an engine's iteration, of a training step, of a refit; lengths of responses. For simulate.py.

Measured (benchmarks/rollout.py, a run's metrics and rollouts), or estimated from data sheets.
"""

import json
import math
import random
import statistics
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from grpo_mcore import metrics
from grpo_mcore.config import InputError


@dataclass(frozen=True)
class EngineProfile:
    """Seconds of one engine."""

    iteration_s: tuple[tuple[int, float], ...]  # (running responses, seconds in which each gains a token), ascending; linear between, and beyond by the last slope
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
        return iterations * self.base_s(running) + self.kv_token_s * (iterations * kv_tokens + running * (iterations * (iterations - 1) // 2))

    def iterations_within(self, seconds: float, running: int, kv_tokens: int) -> int:
        """How many are over after `seconds`: the inverse of decode_s, which is quadratic in the iterations."""
        if seconds <= 0:
            return 0
        a = self.kv_token_s * running / 2
        b = self.base_s(running) + self.kv_token_s * kv_tokens - a
        n = int(seconds / b) if not a else int((math.sqrt(b * b + 4 * a * seconds) - b) / (2 * a))
        while n > 0 and self.decode_s(n, running, kv_tokens) > seconds:
            n -= 1
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
        return self.step_s + self.token_s * sum(sequence_tokens) + self.token_pair_s * sum(n * n for n in sequence_tokens)


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
