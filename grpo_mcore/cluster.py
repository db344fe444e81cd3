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
from grpo_mcore.config import Config, InputError


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


# Lengths: position in the stream -> Draw.

class Measured:
    """The groups of a run in their order, over and over."""

    def __init__(self, run_dir: str | Path):
        """Reads RUN/rollouts/*.jsonl. Raises InputError if there are none."""
        groups: dict[int, list[dict]] = {}
        for path in sorted(Path(run_dir).glob("rollouts/step_*.jsonl")):
            for line in path.read_text().splitlines():
                row = json.loads(line)
                groups.setdefault(row["position"], []).append(row)
        if not groups:
            raise InputError("--like", str(run_dir), "has no rollouts/step_*.jsonl", "name the folder of a run that has trained at least one step")
        self.draws = [
            Draw(rows[0]["prompt_tokens"], tuple(r["response_tokens"] for r in rows), len({r["reward"] for r in rows}) > 1) for _, rows in sorted(groups.items())]

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
        return Draw(self.prompt_tokens, tuple(min(max(round(n), 1), self.max_tokens) for n in lengths), rng.random() >= self.flat_frac)


# Measured seconds.

def engine_from(path: str | Path, *, kv_cache_tokens: int | None = None) -> EngineProfile:
    """The profile that benchmarks/rollout.py wrote. Raises InputError."""
    try:
        p = json.loads(Path(path).read_text())["profile"]
        return EngineProfile(tuple((int(n), s) for n, s in p["iteration_s"]), p["kv_token_s"], p["prefill_token_s"], p["response_s"], p["block_tokens"],
                             p["kv_cache_tokens"] if kv_cache_tokens is None else kv_cache_tokens)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError("--profile", str(path), f"is no profile ({type(e).__name__}: {e})", "name a file that benchmarks/rollout.py wrote") from e


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
    for row in metrics.read(run_dir):
        path = Path(run_dir) / "rollouts" / f"step_{row['step']:06d}.jsonl"
        if "time/rollout_s" not in row or not path.is_file():
            continue
        responses = [json.loads(line) for line in path.read_text().splitlines()]
        seconds = {name: s for name, s in row.items() if name.startswith("time/") and name != "time/eval_s"}
        refit_s, rollout_s = seconds.pop("time/refit_s"), seconds.pop("time/rollout_s")
        out.append(MeasuredStep(refit_s, rollout_s, sum(seconds.values()), sum(r["prompt_tokens"] + r["response_tokens"] for r in responses)))
    if not out:
        raise InputError("--like", str(run_dir), "has no step with its seconds (metrics.jsonl) and its responses (rollouts)", "name the folder of a run that has trained at least one step")
    return out


def trainer_of(steps: Sequence[MeasuredStep]) -> TrainerProfile:
    """Seconds per token, and the mean refit."""
    return TrainerProfile(token_s=sum(s.train_s for s in steps) / sum(s.tokens for s in steps), refit_s=statistics.mean(s.refit_s for s in steps))


# Estimates, for what is not measured. The shares below are assumptions, in the middle of what is commonly reached.

@dataclass(frozen=True)
class Gpu:
    flops_per_s: float  # bfloat16, dense
    bytes_per_s: float  # of its memory
    memory_bytes: float


GPUS = {  # vendors' data sheets, SXM
    "A100": Gpu(312e12, 2.04e12, 80e9), "H100": Gpu(989e12, 3.35e12, 80e9), "H200": Gpu(989e12, 4.8e12, 141e9), "B200": Gpu(2250e12, 8e12, 180e9)}
BANDWIDTH_FRAC = 0.7  # of a GPU's memory, while an engine decodes
ENGINE_FLOPS_FRAC = 0.4  # of its peak, while an engine computes prompts or large batches
TRAINER_FLOPS_FRAC = 0.35  # of its peak, packing and pipeline included
CACHE_MEMORY_FRAC = 0.85  # of its memory, weights and cache of an engine
ITERATION_S = 0.003  # of every iteration: launches, scheduling, sampling
REFIT_BYTES_PER_S, REFIT_S = 20e9, 2.0  # one engine's weights over the network, all engines at once; besides: pause, canary, going on
BLOCK_TOKENS = 16  # vLLM's on a GPU


@dataclass(frozen=True)
class Shape:
    """Of a dense model."""

    parameters: int
    multiplied: int  # parameters that a token is multiplied with: all but the embedding, which is looked up
    layers: int
    width: int  # heads x head_dim
    kv_bytes: int  # per token, bfloat16

    @classmethod
    def of(cls, folder: str | Path) -> "Shape":
        """From its Hugging Face config.json. Raises InputError."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise InputError("model", str(folder), "is no folder with a config.json, which an estimate needs", "add model=configs/benchmarks/1.5b, or another folder")
        c = json.loads(path.read_text())
        d, layers, heads = c["hidden_size"], c["num_hidden_layers"], c["num_attention_heads"]
        head_dim, kv_heads = c.get("head_dim") or d // heads, c.get("num_key_value_heads") or heads
        embedding = c["vocab_size"] * d
        multiplied = layers * (2 * d * head_dim * (heads + kv_heads) + 3 * d * c["intermediate_size"]) + embedding
        return cls(multiplied + (0 if c.get("tie_word_embeddings") else embedding), multiplied, layers, heads * head_dim, 4 * layers * kv_heads * head_dim)


def engine_on(gpu: Gpu, shape: Shape, *, tp: int) -> EngineProfile:
    """bfloat16 on `tp` GPUs that share weights and cache evenly, at no cost: an iteration reads every weight once, or takes its products' time
    if that is longer; and it reads the whole cache."""
    bytes_per_s, flops_per_s = gpu.bytes_per_s * BANDWIDTH_FRAC * tp, gpu.flops_per_s * ENGINE_FLOPS_FRAC * tp
    return EngineProfile(
        tuple((n, ITERATION_S + max(2 * shape.multiplied / bytes_per_s, 2 * shape.multiplied * n / flops_per_s)) for n in (1 << i for i in range(13))),
        kv_token_s=shape.kv_bytes / bytes_per_s, prefill_token_s=2 * shape.multiplied / flops_per_s, block_tokens=BLOCK_TOKENS,
        kv_cache_tokens=int((gpu.memory_bytes * CACHE_MEMORY_FRAC * tp - 2 * shape.parameters) / shape.kv_bytes))


def trainer_on(gpu: Gpu, shape: Shape, *, num_gpus: int, forward_passes: int) -> TrainerProfile:
    """`forward_passes`: those of all of a step's phases, a backward pass counted as two."""
    seconds_per_flop = forward_passes / (gpu.flops_per_s * TRAINER_FLOPS_FRAC * num_gpus)
    return TrainerProfile(
        token_s=2 * shape.multiplied * seconds_per_flop, token_pair_s=2 * shape.layers * shape.width * seconds_per_flop,  # causal: half of 4 x width a pair
        refit_s=REFIT_S + 2 * shape.parameters / REFIT_BYTES_PER_S)


def forward_passes(cfg: Config) -> int:
    """Old log-probs, forward and backward of the update; reference log-probs; full recomputation."""
    return 1 + 3 + (cfg.loss.kl_coef > 0) + (cfg.parallel.recompute == "full")
