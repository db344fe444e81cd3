"""The loop: GRPO, in the paper's order. What it works with is made in run.py."""

import dataclasses
import enum
import functools

import torch

from grpo_mcore import entry
from grpo_mcore.checkpoint import checkpoint
from grpo_mcore.config import config
from grpo_mcore.evaluate.evaluate import evaluate
from grpo_mcore.loss import advantage, batch, loss
from grpo_mcore.parallel import collectives
from grpo_mcore.policy import model
from grpo_mcore.policy.policy import learning_rate
from grpo_mcore.report import metrics
from grpo_mcore.report.samples import rollout_rows, sample_metrics
from grpo_mcore.reward import shaping
from grpo_mcore.rollout.engines import EnginesLost
from grpo_mcore.rollout.rollout import Sampled
from grpo_mcore.run import Driver, Run, is_finished, last_step, make_model, open_run, summarize
from grpo_mcore.types import GlobalBatch, Group


class Without(enum.Enum):
    """Why a step has no samples."""

    FINISHED = "the last step is done"
    ENGINES_LOST = "those that take their place sample the same step again"
    PREEMPTED = "SIGTERM came"


def train(run: Run) -> None:
    """From the restored step to the last. Every rank runs it; comments name what only the driver does.

    Raises entry.Preempted, with the last completed step saved, if SIGTERM came.
    """
    cfg, time_of = run.cfg, run.timer
    while True:
        step = run.progress.step  # the policy has completed exactly `step` steps: its version
        with run.gpus_lent():
            with time_of("refit"):
                refit_metrics = run.refit(version=step)
            sampled = collectives.broadcast(evaluate_and_sample(run, step), run.topology)
        if sampled is Without.PREEMPTED:
            return leave(run)
        if sampled is Without.ENGINES_LOST:
            continue
        if sampled is Without.FINISHED:
            break
        rewards_PG = shaping.shaped(sampled.graded, cfg.reward, cfg.shaping, cfg.rollout.max_response_tokens)
        advantages_PG = advantage.group_advantages(rewards_PG, **dataclasses.asdict(cfg.advantage))
        batches = assemble(run, [g.group for g in sampled.graded], advantages_PG)
        with time_of("logprob"):
            mismatch = score(run, batches)
        with time_of("update"):
            lr = learning_rate(cfg.optimizer, step, cfg.num_steps)
            updates = [update(run, b, lr) for b in batches]
        run.progress = checkpoint.Progress(step + 1, sampled.cursor, run.seconds(), sampled.left_out)
        write_step(run, sampled, refit_metrics, [mismatch, *updates], batches, lr)
        run.last_step = last_step(cfg, step + 1, run.topology)
        with time_of("checkpoint"):
            run.checkpoints.poll()
            if cfg.checkpoint.every and ((step + 1) % cfg.checkpoint.every == 0 or step + 1 == run.last_step):
                run.checkpoints.save(run.progress)
    run.checkpoints.wait()
    if run.preemption.asked:  # on the driver, whose last evaluation may be missing
        raise entry.Preempted("stopped by SIGTERM after the last step; the same command evaluates it")


def evaluate_and_sample(run: Run, step: int) -> Sampled | Without | None:
    """On the driver: evaluates where it is due, and waits for the step's graded groups. Elsewhere None.

    With rollout.max_staleness, further steps go on being sampled afterwards.
    """
    driver, cfg = run.driver, run.cfg
    if driver is None:
        return None

    def work() -> Sampled | Without:
        try:
            if step < run.last_step:
                driver.rollout.begin(step)
            if cfg.eval.data and driver.evaluated < step and (step % cfg.eval.every == 0 or step == run.last_step):
                with run.timer("eval"):
                    evaluate_and_write(run, driver, step)
            with run.timer("rollout"):
                return driver.rollout.take() if step < run.last_step else Without.FINISHED
        except EnginesLost:
            return Without.ENGINES_LOST

    return run.preemption.unless_asked(work) or Without.PREEMPTED


def evaluate_and_write(run: Run, driver: Driver, step: int) -> None:
    result = evaluate(
        driver.engines,
        driver.eval_prompts,
        run.tokenizer,
        driver.rewards,
        run.cfg,
        version=step,
        num_left_out=driver.num_left_out,
        turns=driver.turns,
    )
    driver.writer.write(step, result.metrics())
    driver.writer.say(f"evaluation after {step} steps: {result}")
    driver.evaluated = step


def leave(run: Run) -> None:
    """Saves the last completed step, whose weights no update has touched yet, and ends the run."""
    if run.progress.step > run.checkpoints.newest_step:
        run.checkpoints.save(run.progress)
    run.checkpoints.wait()
    saved = f"step {run.progress.step} is saved" if run.progress.step else "no step was completed"
    raise entry.Preempted(f"stopped by SIGTERM: {saved}; the same command goes on from there")


def assemble(run: Run, groups: list[Group], advantages_PG: torch.Tensor) -> list[GlobalBatch]:
    """One GlobalBatch per optimizer step: this rank's part."""
    cfg = run.cfg
    return batch.assemble(
        groups,
        advantages_PG,
        global_batch_size=cfg.batch.global_batch_size,
        aggregation=cfg.loss.aggregation,
        max_response_tokens=cfg.rollout.max_response_tokens,
        skip_truncated=cfg.loss.skip_truncated,
        packing=model.packing(
            run.policy.hf_config, run.topology, cfg.precision, max_tokens=cfg.batch.max_tokens_per_microbatch
        ),
    )


def score(run: Run, batches: list[GlobalBatch]) -> dict[str, metrics.Metric]:
    """Fills in old and reference log-probs and importance weights of all batches, before the first update; returns how
    far the engines' log-probs differ."""
    cfg, parts = run.cfg.loss, []
    for b in batches:
        for m, logprobs_R in zip(b.microbatches, run.policy.logprobs(b.microbatches), strict=True):
            m.old_logprobs_R = logprobs_R
            if logprobs_R is not None:  # the last pipeline stage
                positions_R = m.position_ids_T[m.position_R]
                parts.append(metrics.mismatch(m.rollout_logprobs_R, logprobs_R, positions_R, cap=cfg.importance_cap))
                if cfg.importance_level != "none":
                    m.importance_R, beyond_R = loss.importance(m, cfg, run.over_ranks)
                    parts.append(metrics.importance(m.importance_R, beyond_R))
        if run.reference is not None:
            for m, logprobs_R in zip(b.microbatches, run.reference.logprobs(b.microbatches), strict=True):
                m.ref_logprobs_R = logprobs_R
    return metrics.merge(parts)


def update(run: Run, b: GlobalBatch, lr: float) -> dict[str, metrics.Metric]:
    """One optimizer step."""
    return run.policy.update(b, functools.partial(loss.grpo, cfg=run.cfg.loss, over_ranks=run.over_ranks), lr=lr)


def write_step(
    run: Run, sampled: Sampled, refit_metrics: dict, parts: list[dict], batches: list[GlobalBatch], lr: float
) -> None:
    """One row of metrics, of all ranks, and the step's rollouts. Collective. Raises MismatchError on all ranks."""
    driver = run.driver
    mine = metrics.merge(parts) if run.topology.reports else {}
    of_driver = [refit_metrics, sampled.metrics] if driver else []
    merged = metrics.merge([*of_driver, *collectives.gather(mine, run.topology)])
    metrics.check_mismatch(merged, run.cfg.mismatch, speaks=driver is not None)
    if driver is None:
        return
    times = run.timer.drain()
    row = {
        **sample_metrics(sampled.graded),
        **{name: metric.value for name, metric in sorted(merged.items())},
        "update/lr": lr,
        "update/microbatches": float(sum(len(b.microbatches) for b in batches)),
        "update/packed_frac": sum(b.packed_frac for b in batches) / len(batches),
        "update/imbalance": max(b.imbalance for b in batches),
        **times,
        "tokens_per_s": sum(b.num_tokens for b in batches)
        / sum(s for name, s in times.items() if name not in ("time/eval_s", "time/checkpoint_s")),
    }
    step, decode = run.progress.step, run.tokenizer.decode
    driver.writer.write(step, row)
    driver.writer.write_rollouts(
        step, rollout_rows(sampled.graded, keep_texts=run.cfg.rollout.keep_texts, decode=decode)
    )
    driver.writer.show(step, row)


def main(cfg: config.Config) -> None:
    """From a checked configuration to a trained policy; a finished run is only summarised again."""
    if is_finished(cfg):
        return
    make_model(cfg)
    with open_run(cfg) as run:
        train(run)
        if run.driver is not None:
            summarize(run)
