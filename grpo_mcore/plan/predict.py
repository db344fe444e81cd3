"""Before a cluster is paid for: step time, utilisation and staleness that a configuration will have, or had, beside
what was measured.

What is asked for is a Question; its answer is printed as a table, one column per staleness.
"""

import dataclasses
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_mcore import entry
from grpo_mcore.config.config import Config, InputError
from grpo_mcore.plan import cluster, memory, time as plan_time
from grpo_mcore.plan.cluster import Cluster, Draw, Failures, LogNormal, Measured
from grpo_mcore.plan.memory import Machine
from grpo_mcore.plan.simulate import Simulation, Step

MEDIAN_FRAC, MEAN_FRAC = 0.25, 0.35  # of the limit: lengths of responses where nothing is known of them
NUM_DRAWS = 256  # of prompts, for their mean


@dataclass(frozen=True)
class Prediction:
    """Over steps; fractions are of wall clock, or of all engines' wall clock."""

    step_s_mean: float
    step_s_p50: float
    step_s_p95: float
    refit_frac: float
    rollout_frac: float  # trainers wait for groups
    train_frac: float
    engines_busy_frac: float  # something runs
    slots_frac: float  # of engine.max_running_responses
    response_tokens_mean: float
    response_tokens_per_s: float  # trained on
    staleness_mean: float  # in steps, of tokens trained on
    staleness_max: int
    failures: int
    issued_again: int  # requests that an engine lost
    groups_dropped: int  # too stale
    preemptions: int  # responses that lost their place in an engine's cache


def summary(steps: Sequence[Step], num_engines: int, max_running_responses: int, responses_per_step: int) -> Prediction:
    seconds = [s.seconds for s in steps]
    total, tokens = sum(seconds), sum(s.response_tokens for s in steps)
    return Prediction(
        step_s_mean=total / len(steps),
        step_s_p50=statistics.median(seconds),
        step_s_p95=sorted(seconds)[max(-(-len(steps) * 95 // 100) - 1, 0)],
        refit_frac=sum(s.refit_s for s in steps) / total,
        rollout_frac=sum(s.rollout_s for s in steps) / total,
        train_frac=sum(s.train_s for s in steps) / total,
        engines_busy_frac=sum(s.busy_s for s in steps) / total / num_engines,
        slots_frac=sum(s.slots_s for s in steps) / total / num_engines / max_running_responses,
        response_tokens_mean=tokens / len(steps) / responses_per_step,
        response_tokens_per_s=tokens / total,
        staleness_mean=sum(s.staleness * s.response_tokens for s in steps) / tokens,
        staleness_max=max(s.max_staleness for s in steps),
        failures=sum(s.failures for s in steps),
        issued_again=sum(s.issued_again for s in steps),
        groups_dropped=sum(s.dropped for s in steps),
        preemptions=sum(s.preemptions for s in steps),
    )


@dataclass(frozen=True)
class Question:
    """None: not given."""

    like: str | None = None  # RUN: its lengths; and its trainers' seconds, unless a machine is given
    profile: str | None = None  # JSON of benchmarks/rollout.py: the engines' seconds
    machine: Machine | None = None  # what is not measured is estimated for it
    model_config: str | None = None
    steps: int | None = None  # without those that fill the pipeline
    staleness: tuple[int, ...] | None = None  # None: the configuration's
    median_tokens: float | None = None  # of responses
    mean_tokens: float | None = None
    prompt_tokens: float | None = None
    flat_frac: float = 0  # groups without variance
    failures_per_day: float = 0.0  # of all engines together
    restart_s: float = 300.0


def cluster_of(
    cfg: Config, ask: Question, draw: Callable[[int], Draw], measured: Sequence[cluster.MeasuredStep]
) -> Cluster:
    """Measured parts where they are given, else estimates. Raises InputError."""
    engine = cluster.engine_from(ask.profile) if ask.profile else None
    trainer = cluster.trainer_of(measured) if measured and ask.machine is None else None
    if engine is None or trainer is None:
        machine = ask.machine or memory.machine_of(None, None)  # which is refused
        draws = [draw(p) for p in range(NUM_DRAWS)]
        mean = plan_time.Assumptions(
            statistics.mean(d.prompt_tokens for d in draws),
            statistics.mean(n for d in draws for n in d.response_tokens),
        )
        parts = cluster.estimated(memory.Case(cfg, memory.hf_config_of(cfg, ask.model_config), machine), mean)
        engine, trainer = engine or parts.engine, trainer or parts.trainer
    if engine.kv_cache_tokens is not None and engine.kv_cache_tokens < cfg.longest_tokens:
        raise InputError(
            "engine.tp",
            cfg.engine.tp,
            f"leaves room for {engine.kv_cache_tokens} tokens in an engine's cache, less than the longest "
            f"sequence, {cfg.longest_tokens}",
            "raise it, or shorten the sequences",
        )
    rate = ask.failures_per_day
    return Cluster(engine, trainer, Failures(cfg.engine.num_engines * 86400 / rate, ask.restart_s) if rate else None)


def lengths_of(cfg: Config, ask: Question) -> Measured | LogNormal:
    """Raises InputError."""
    r = cfg.rollout
    if ask.like and ask.median_tokens is None:
        measured = Measured(ask.like)
        if (group_size := len(measured.draws[0].response_tokens)) != r.group_size:
            raise InputError(
                "rollout.group_size",
                r.group_size,
                f"and the groups of {ask.like} have {group_size} responses",
                "take the run's, or give --median-tokens",
            )
        return measured
    prompt_tokens = int(ask.prompt_tokens or min(plan_time.PROMPT_TOKENS, cfg.data.max_prompt_tokens))
    limit = cfg.response_tokens(prompt_tokens)
    median = entry.number("--median-tokens", ask.median_tokens or MEDIAN_FRAC * limit, 1)
    mean = entry.number("--mean-tokens", ask.mean_tokens or median * MEAN_FRAC / MEDIAN_FRAC, median)
    return LogNormal(median, mean, limit, prompt_tokens, r.group_size, ask.flat_frac)


def run(cfg: Config, parts: Cluster, draw: Measured | LogNormal, *, num_steps: int, skip: int) -> list[Step]:
    """The steps after the first `skip`."""
    return Simulation(cfg.rollout, cfg.engine, parts, draw, seed=cfg.seed).run(skip + num_steps)[skip:]


def answer(cfg: Config, ask: Question) -> dict[str, Any]:
    """Predictions by staleness, with what they rest on; with `like`, of the same configuration too, beside what was
    measured."""
    draw = lengths_of(cfg, ask)
    measured = cluster.counted(cluster.measured_steps(ask.like)) if ask.like else []
    parts = cluster_of(cfg, ask, draw, measured)
    num_steps = ask.steps or len(measured) or 10
    ages = (cfg.rollout.max_staleness,) if ask.staleness is None else ask.staleness
    if any(ages) and ask.machine and cfg.engine.is_colocated("cuda"):
        raise InputError(
            "engine.placement",
            cfg.engine.placement,
            "is on the trainers' GPUs: such engines sleep while these train, which is not simulated ahead of training",
            "set it to disaggregated, or staleness to 0",
        )
    out: dict[str, Any] = {
        "engine": dataclasses.asdict(parts.engine),
        "trainer": dataclasses.asdict(parts.trainer),
        "predicted": {},
        "lengths": dataclasses.asdict(draw) if isinstance(draw, LogNormal) else {"like": ask.like},
    }
    sizes = cfg.engine.num_engines, cfg.engine.max_running_responses, cfg.responses_per_step
    for age in ages:
        of = memory.changed(cfg, {"rollout.max_staleness": age})
        steps = run(of, parts, draw, num_steps=num_steps, skip=1 if ask.like else age + 1)
        out["predicted"][age] = dataclasses.asdict(summary(steps, *sizes))
        if ask.like and age == cfg.rollout.max_staleness:
            out["measured"] = comparison(measured, steps)
    return out


def comparison(measured: Sequence[cluster.MeasuredStep], predicted: Sequence[Step]) -> dict[str, dict[str, float]]:
    """Mean and median seconds by phase."""
    out = {}
    for name in ("refit_s", "rollout_s", "train_s", "seconds"):
        m, p = ([getattr(s, name) for s in steps] for steps in (measured, predicted))
        out["step_s" if name == "seconds" else name] = {
            "measured": statistics.mean(m),
            "predicted": statistics.mean(p),
            "predicted_over_measured": statistics.mean(p) / statistics.mean(m),
            "measured_p50": statistics.median(m),
            "predicted_p50": statistics.median(p),
        }
    return out


def table(result: dict[str, Any]) -> str:
    columns = result["predicted"]
    lines = [f"{'rollout.max_staleness':24}" + "".join(f"{age:>14}" for age in columns)]
    for name in next(iter(columns.values())):
        lines.append(f"{name:24}" + "".join(_cell(name, column[name]) for column in columns.values()))
    if "measured" in result:
        titles = ("measured", "predicted", "ratio", "measured p50", "predicted p50")
        lines += ["", f"{'seconds of a step':24}" + "".join(f"{title:>14}" for title in titles)]
        for name, row in result["measured"].items():
            lines.append(f"{name:24}" + "".join(f"{value:14.3f}" for value in row.values()))
    return "\n".join(lines)


def _cell(name: str, value: float) -> str:
    if name.endswith("_frac"):
        return f"{value:14.1%}"
    return f"{value:14,}" if isinstance(value, int) else f"{value:14,.2f}"


def write(result: dict[str, Any], path: str | Path) -> None:
    Path(path).write_text(json.dumps(result, indent=1) + "\n")
