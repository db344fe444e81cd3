"""Whether a run fits its machines, in minutes (launch/train.py --fit): all that a run builds, and a worst case of its
step.

    refit      weights to the engines: before the updates, and after them
    logprob    old (and reference) log-probs of ONE global batch of random sequences, each of the greatest length
    update     an optimizer step with that batch
    rollout    a whole step's responses at their greatest length, for at most SAMPLE_S

Logprob and update come twice, in turns, and so does refit: the first time kernels are compiled and buffers made, and
only the second time the optimizer's state is there beside the activations. The second time's seconds count.

Nothing is saved: the run's folder is RUN_DIR.fit, which is removed. Evaluation and checkpoints are not in it.
"""

import contextlib
import dataclasses
import math
import random
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from pathlib import Path

import torch

from grpo_mcore import entry, trainer
from grpo_mcore.config import config
from grpo_mcore.loss import advantage
from grpo_mcore.parallel import collectives, topology
from grpo_mcore.plan import memory, time as plan_time
from grpo_mcore.policy.policy import learning_rate
from grpo_mcore.rollout.engine import Completion, Sampling
from grpo_mcore.run import Driver, Run, make_model, open_run
from grpo_mcore.types import Group, Prompt, Response

SAMPLE_S = 60.0


class Phases:
    """`measured`: seconds and peak bytes of each phase on this rank. Of a phase that comes again the seconds are the
    last time's, since the first compiles kernels and makes buffers (its own are `first`), and the bytes the greatest.
    GPU: allocated and reserved by it, in use by all at the phase's end."""

    def __init__(self, cfg: config.Config):
        self.measured: dict[str, dict[str, float]] = {}
        self._cfg, self._device = cfg, topology.pick_device(cfg.device)
        if self._device.type == "cuda":  # nobody has used it yet, and its statistics are asked for
            torch.cuda.set_device(self._device)
            torch.cuda.init()  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Raises entry.DoesNotFit if this rank's GPU has too little memory."""
        start, gpu = time.perf_counter(), self._device if self._device.type == "cuda" else None
        if gpu:
            torch.cuda.reset_peak_memory_stats(gpu)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
        try:
            yield
        except torch.OutOfMemoryError as e:
            raise entry.DoesNotFit(explain(self._cfg, name, e, machine_here(self._cfg))) from e
        if gpu:
            torch.cuda.synchronize(gpu)
            free, total = torch.cuda.mem_get_info(gpu)
            peak = {
                "allocated": torch.cuda.max_memory_allocated(gpu),
                "reserved": torch.cuda.max_memory_reserved(gpu),
                "in use": total - free,
            }
        else:
            peak = {"resident": 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])}
        before = self.measured.get(name, {})
        self.measured[name] = {
            "seconds": time.perf_counter() - start,
            **({"first": before.get("first", before["seconds"])} if before else {}),
            **{what: max(n, before.get(what, 0)) for what, n in peak.items()},
        }


def machine_here(cfg: config.Config) -> memory.Machine | None:
    """The run's GPUs, if the planner knows their kind."""
    if cfg.device == "cpu" or not torch.cuda.is_available():
        return None
    gpu, apart = torch.cuda.get_device_properties(0), not cfg.engine.is_colocated("cuda")
    num_gpus = topology.world_size() + apart * cfg.engine.num_engines * cfg.engine.tp
    return next(
        (
            memory.Machine(name, num_gpus)
            for name, known in memory.GPUS.items()
            if name.split("-")[0].upper() in gpu.name and abs(gpu.total_memory / known.memory_bytes - 1) < 0.1
        ),
        None,
    )


def explain(cfg: config.Config, phase: str, error: Exception, machine: memory.Machine | None) -> str:
    change = memory.smallest_change(memory.Case(cfg, memory.hf_config_of(cfg), machine)) if machine else None
    return (
        f"{phase} does not fit: {error} Remedy: "
        f"{memory.overrides(change) if change else 'launch/plan.py, for GPUs like these'}"
    )


def greatest(cfg: config.Config) -> tuple[int, int]:
    """(prompt, response tokens) of the longest sequence, as much of it response as may be."""
    response = min(cfg.rollout.max_response_tokens, cfg.longest_train_tokens - 1)
    return cfg.longest_train_tokens - response, response


def synthetic_groups(cfg: config.Config, vocab_size: int) -> list[Group]:
    """Enough for a global batch, the same on every rank."""
    rng, (prompt, response), G = random.Random(cfg.seed), greatest(cfg), cfg.rollout.group_size

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(rng.choices(range(vocab_size), k=n))

    return [
        Group(
            Prompt(i, "", "", tokens(prompt)),
            tuple(Response(tokens(response), (-math.log(vocab_size),) * response, False) for _ in range(G)),
        )
        for i in range(math.lcm(G, cfg.batch.global_batch_size) // G)
    ]


def learn(run: Run, phases: Phases) -> None:
    cfg, groups, rng = run.cfg, synthetic_groups(run.cfg, run.policy.hf_config.vocab_size), random.Random(run.cfg.seed)
    rewards_PG = torch.tensor([[float(rng.random() < 0.5) for _ in g.responses] for g in groups])
    advantages_PG = advantage.group_advantages(rewards_PG, **dataclasses.asdict(cfg.advantage))
    b = trainer.assemble(run, groups, advantages_PG)[0]
    for _ in range(2):
        with phases("logprob"):
            trainer.score(run, [b])
        with phases("update"):
            trainer.update(run, b, learning_rate(cfg.optimizer, 0, cfg.num_steps))


def sample(run: Run, driver: Driver) -> None:
    """Raises EngineError."""
    r, rng, vocab = run.cfg.rollout, random.Random(run.cfg.seed), range(run.policy.hf_config.vocab_size)
    prompt, response = greatest(run.cfg)

    def submit(i: int) -> Future[list[Completion]]:
        sampling = Sampling(r.group_size, r.temperature, response, seed=i, never_stop=True)
        return driver.engines.submit((i,), rng.choices(vocab, k=prompt), sampling, "rollout")

    answers = [submit(i) for i in range(r.prompts_per_step)]
    done, late = wait(answers, SAMPLE_S)
    driver.engines.check()
    driver.engines.cancel([(i,) for i, answer in enumerate(answers) if answer in late])
    num_tokens = sum(len(c.token_ids) for answer in done for c in answer.result())
    print(
        f"rollout: {len(done)} of {len(answers)} groups of {r.group_size} responses were done within "
        f"{SAMPLE_S:.0f} s, {num_tokens} tokens",
        flush=True,
    )


def report(cfg: config.Config, ranks: list[dict[str, dict[str, float]]], machine: memory.Machine | None) -> str:
    """Of each phase the slowest and the fullest of the ranks' `Phases.measured`; in brackets what the planner
    foretells."""
    foretold = {}
    if machine:
        case, once = memory.Case(cfg, memory.hf_config_of(cfg), machine), 1 / cfg.optimizer_steps_per_step
        m, s = memory.needed(case), plan_time.times(case, plan_time.Assumptions(*map(float, greatest(cfg))))
        foretold = {
            "logprob": f"{once * s['logprob']:.1f} s",
            "update": f"{once * s['update']:.1f} s, in use {m.total('update') / 1e9:.2f} GB",
            "refit": f"{s['refit']:.1f} s",
            "rollout": f"in use {m.total('rollout') / 1e9:.2f} GB",
        }
    lines = [
        f"the slowest and the fullest of {len(ranks)} "
        f"ranks{f', and in brackets what is foretold for {machine.num_gpus} x {machine.name}' if machine else ''}"
    ]
    for phase in ranks[0]:
        most = {what: max(measured[phase][what] for measured in ranks) for what in ranks[0][phase]}
        seconds, first = most.pop("seconds"), most.pop("first", None)
        lines.append(
            f"  {phase:8} {seconds:7.1f} s, {', '.join(f'{what} {n / 1e9:.2f} GB' for what, n in most.items())}"
            + ("" if first is None else f", the first time {first:.1f} s")
            + (f" ({foretold[phase]})" if phase in foretold else "")
        )
    return "\n".join(lines)


def main(cfg: config.Config) -> None:
    """Prints the report. Raises entry.DoesNotFit."""
    cfg = dataclasses.replace(cfg, run_dir=cfg.run_dir.rstrip("/") + ".fit")
    with contextlib.ExitStack() as stack:
        if topology.rank() == 0:
            stack.callback(shutil.rmtree, cfg.run_dir, ignore_errors=True)
        make_model(cfg)
        phases = Phases(cfg)
        with phases("build"):
            run = stack.enter_context(open_run(cfg))
        if run.driver is not None:
            entry.stop_on_sigterm()  # there is nothing to save
        for version in (0, 1):
            with run.gpus_lent():
                with phases("refit"):
                    run.refit(version=version)
                with phases("rollout") if version else contextlib.nullcontext():
                    if version and run.driver:
                        sample(run, run.driver)
                    collectives.broadcast(None, run.topology)  # all wait for the driver
            if not version:
                learn(run, phases)
        ranks = collectives.gather(phases.measured, run.topology)
        if run.driver is not None:
            print(report(cfg, ranks, machine_here(cfg)), flush=True)
