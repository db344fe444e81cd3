"""The loop. `train` is the algorithm; `open_run` makes its parts and closes them again, whatever happens."""

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from grpo_mcore import entry, stop
from grpo_mcore.checkpoint import checkpoint
from grpo_mcore.config import config, file as config_file, rules
from grpo_mcore.data import prompts
from grpo_mcore.evaluate.evaluate import evaluate
from grpo_mcore.loss import advantage, batch, loss
from grpo_mcore.parallel import collectives, topology
from grpo_mcore.parallel.topology import Topology
from grpo_mcore.policy import model, warm_start
from grpo_mcore.policy.hf_weights import local_folder
from grpo_mcore.policy.policy import FrozenPolicy, Policy, learning_rate
from grpo_mcore.refit.refit import Refit
from grpo_mcore.report import curves, metrics
from grpo_mcore.report.provenance import provenance
from grpo_mcore.reward import shaping
from grpo_mcore.reward.grader import Grader, Verdict, counts
from grpo_mcore.rollout.engines import Engines, EnginesLost
from grpo_mcore.rollout.rollout import Rollout, Step
from grpo_mcore.types import GlobalBatch, Group

NUM_CANARIES, CANARY_TOKENS = 4, 64
ENGINES_LOST = "engines lost"


@dataclass
class Run:
    """The parts of a run on this rank. Engines, rollout, grader and writer are the driver's alone (None elsewhere)."""

    cfg: config.Config
    topology: Topology
    tokenizer: prompts.Tokenizer
    eval_prompts: list
    policy: Policy
    reference: FrozenPolicy | None
    progress: checkpoint.Progress
    refit: Refit
    checkpoints: checkpoint.Checkpoints
    preemption: entry.Preemption
    timer: metrics.Timer
    engines: Engines | None
    rollout: Rollout | None
    grader: Grader | None
    writer: metrics.Writer | None
    seconds_before: float  # wall clock of the run's earlier processes
    last_step: int  # num_steps, or where the stop rule ends the run
    evaluated: int = -1  # the step whose policy was evaluated last

    def seconds(self) -> float:
        """Wall clock of the run so far, imports included."""
        return self.seconds_before + time.monotonic() - entry.BEGAN


def train(run: Run) -> None:
    """GRPO from the restored step to num_steps. Every rank runs it; comments name what only the driver does.

    Raises entry.Preempted, with the last completed step saved, if SIGTERM came.
    """
    cfg, time_of = run.cfg, run.timer
    over_ranks = functools.partial(collectives.sum_over_context, topology=run.topology)
    while True:
        step = run.progress.step  # the policy has completed exactly `step` steps: its version
        lend_gpus(run)
        with time_of("refit"):
            refit_metrics = run.refit(version=step)
        work = collectives.broadcast(evaluate_and_sample(run, step), run.topology)
        reclaim_gpus(run)
        if work is None:
            return leave(run)
        if work == ENGINES_LOST:  # the same step again, with those that take their place
            continue
        if step == run.last_step:
            break
        rewards_PG = shaping.shaped(work.rewards_PG, work.groups, cfg.shaping, cfg.rollout.max_response_tokens)
        advantages_PG = advantage.group_advantages(rewards_PG, **dataclasses.asdict(cfg.advantage))
        batches = assemble(run, work.groups, advantages_PG)
        with time_of("logprob"):
            mismatch = score(run, batches)
        with time_of("update"):
            lr = learning_rate(cfg.optimizer, step, cfg.num_steps)
            updates = [
                run.policy.update(b, functools.partial(loss.grpo, cfg=cfg.loss, over_ranks=over_ranks), lr=lr)
                for b in batches
            ]
        run.progress = checkpoint.Progress(step + 1, work.cursor, run.seconds())
        write_step(run, work, refit_metrics, [mismatch, *updates], batches, lr)
        run.last_step = last_step(cfg, step + 1, run.topology)
        with time_of("checkpoint"):
            run.checkpoints.poll()
            if cfg.checkpoint.every and ((step + 1) % cfg.checkpoint.every == 0 or step + 1 == run.last_step):
                run.checkpoints.save(run.progress)
    run.checkpoints.wait()
    if run.preemption.asked:  # on the driver, whose last evaluation may be missing
        raise entry.Preempted("stopped by SIGTERM after the last step; the same command evaluates it")


def evaluate_and_sample(run: Run, step: int) -> Step | str | None:
    """The step's graded groups on the driver ("" after the last step), or ENGINES_LOST, or None if SIGTERM came;
    elsewhere None.

    With rollout.max_staleness, further steps go on being sampled afterwards.
    """
    if run.engines is None:
        return None
    cfg = run.cfg

    def work():
        try:
            if step < run.last_step:
                run.rollout.begin(step)
            if cfg.eval.data and run.evaluated < step and (step % cfg.eval.every == 0 or step == run.last_step):
                with run.timer("eval"):
                    evaluate_and_write(run, step)
                run.evaluated = step
            with run.timer("rollout"):
                return run.rollout.take() if step < run.last_step else ""
        except EnginesLost:
            return ENGINES_LOST

    result = run.preemption.unless_asked(work)
    if colocated(run):
        run.engines.sleep(cfg.refit.timeout_s)
    return result


def last_step(cfg: config.Config, step: int, topology: Topology) -> int:
    """Where the run ends, as its metrics tell after `step` steps. Collective."""
    if cfg.stop == config.Stop():
        return cfg.num_steps
    why = stop.reason(cfg.stop, metrics.read(cfg.run_dir), step) if topology.is_driver and step else None
    if why:
        print(f"the stop rule ends the run after {step} steps: {why}", flush=True)
    return collectives.broadcast(step if why else cfg.num_steps, topology)


def colocated(run: Run) -> bool:
    return run.cfg.engine.is_colocated(run.topology.device.type)


def lend_gpus(run: Run) -> None:
    """Before a refit wakes the engines: they sample with the memory that the trainer can do without."""
    if colocated(run):
        run.policy.offload(run.cfg.engine.offload_trainer)


def reclaim_gpus(run: Run) -> None:
    """When the engines are asleep."""
    if colocated(run):
        run.policy.onload(run.cfg.engine.offload_trainer)


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
    parts = []
    for b in batches:
        for m, logprobs_R in zip(b.microbatches, run.policy.logprobs(b.microbatches), strict=True):
            m.old_logprobs_R = logprobs_R
            if logprobs_R is not None:  # the last pipeline stage
                parts.append(
                    metrics.mismatch(
                        m.rollout_logprobs_R,
                        logprobs_R,
                        m.position_ids_T[m.position_R],
                        cap=run.cfg.loss.importance_cap,
                    )
                )
                if run.cfg.loss.importance_level != "none":
                    m.importance_R, beyond_R = loss.importance(
                        m, run.cfg.loss, functools.partial(collectives.sum_over_context, topology=run.topology)
                    )
                    parts.append(metrics.importance(m.importance_R, beyond_R))
        if run.reference is not None:
            for m, logprobs_R in zip(b.microbatches, run.reference.logprobs(b.microbatches), strict=True):
                m.ref_logprobs_R = logprobs_R
    return metrics.merge(parts)


def evaluate_and_write(run: Run, step: int) -> None:
    result = evaluate(run.engines, run.eval_prompts, run.tokenizer, run.grader, run.cfg, version=step)
    run.writer.write(step, result.metrics())
    run.writer.say(f"evaluation after {step} steps: {result}")


def write_step(
    run: Run, work: Step, refit_metrics: dict, parts: list[dict], batches: list[GlobalBatch], lr: float
) -> None:
    """One row of metrics, of all ranks, and the step's rollouts. Collective. Raises MismatchError on all ranks."""
    mine = metrics.merge(parts) if run.topology.reports else {}
    merged = metrics.merge(
        [refit_metrics, work.metrics if run.topology.is_driver else {}, *collectives.gather(mine, run.topology)]
    )
    metrics.check_mismatch(merged, run.cfg.mismatch, speaks=run.topology.is_driver)
    if run.writer is None:
        return
    times = run.timer.drain()
    row = {
        **sample_metrics(work.groups, work.verdicts),
        **{name: metric.value for name, metric in sorted(merged.items())},
        "update/lr": lr,
        "update/microbatches": float(sum(len(b.microbatches) for b in batches)),
        "update/packed_frac": sum(b.packed_frac for b in batches) / len(batches),
        "update/imbalance": max(b.imbalance for b in batches),
        **times,
        "tokens_per_s": sum(b.num_tokens for b in batches)
        / sum(s for name, s in times.items() if name not in ("time/eval_s", "time/checkpoint_s")),
    }
    run.writer.write(run.progress.step, row)
    run.writer.write_rollouts(run.progress.step, rollout_rows(run, work))
    run.writer.show(run.progress.step, row)


def rollout_rows(run: Run, work: Step) -> Iterator[dict]:
    """One of each response; the texts of the first groups."""
    verdicts = iter(work.verdicts)
    for index, (position, group) in enumerate(zip(work.positions, work.groups, strict=True)):
        for sample, response in enumerate(group.responses):
            verdict = next(verdicts)
            row = {
                "position": position,
                "prompt_id": group.prompt.id,
                "sample": sample,
                "prompt_tokens": len(group.prompt.token_ids),
                "response_tokens": len(response.token_ids),
                "truncated": response.truncated,
                "versions": response.versions,
                "reward": verdict.reward,
                "status": verdict.status,
                "answer": verdict.answer,
                "detail": verdict.detail,
            }
            if verdict.other is not None:
                row["other_verifier"] = {
                    "reward": verdict.other.reward,
                    "status": verdict.other.status,
                    "answer": verdict.other.answer,
                    "detail": verdict.other.detail,
                }
            if index < run.cfg.rollout.keep_texts:
                row |= {
                    "problem": group.prompt.problem,
                    "gold": group.prompt.answer,
                    "response": run.tokenizer.decode(response.token_ids),
                }
            yield row


def sample_metrics(groups: list[Group], verdicts: list[Verdict]) -> dict[str, float]:
    """Of a step's groups and their verdicts, in order; masked ones only count as such."""

    def mean(values: list) -> float:
        return sum(values) / len(values) if values else 0.0

    it = iter(verdicts)
    graded = [(group, [next(it) for _ in group.responses]) for group in groups]
    graded = [(group, part) for group, part in graded if not group.prompt.masked]
    counted = [v for _, part in graded for v in part]
    responses = [r for group, _ in graded for r in group.responses]
    return {
        "reward/mean": mean([v.reward for v in counted]),
        "reward/mixed_groups_frac": mean([len({v.reward for v in part}) > 1 for _, part in graded]),
        **{f"reward/{status}": float(count) for status, count in counts(counted).items()},
        **({"reward/disagree": float(sum(v.is_disputed for v in counted))} if any(v.other for v in counted) else {}),
        "rollout/masked_prompts_frac": 1 - len(graded) / len(groups),
        "rollout/response_tokens_mean": mean([len(r.token_ids) for r in responses]),
        "rollout/response_tokens_max": float(max((len(r.token_ids) for r in responses), default=0)),
        "rollout/truncated_frac": mean([r.truncated for r in responses]),
    }


@contextlib.contextmanager
def open_run(cfg: config.Config) -> Iterator[Run]:
    """Everything `train` needs. What can be wrong with the input is found before anything expensive starts."""
    hf_config = model.load_hf_config(local := local_folder(cfg.model))
    model.check_parallel(hf_config, cfg.parallel, cfg.precision)
    check_lengths(cfg, hf_config)
    tokenizer = prompts.Tokenizer(local)
    train_prompts, too_long = prompts.load(
        cfg.data.train, cfg.data, tokenizer, "data.train", overlong=cfg.data.overlong_prompts
    )
    eval_prompts = (
        prompts.load(cfg.eval.data, cfg.data, tokenizer, "eval.data")[0][: cfg.eval.max_prompts]
        if cfg.eval.data
        else []
    )
    device = topology.pick_device(cfg.device)
    rules.check_device(cfg, device.type)
    driver = topology.rank() == 0
    with contextlib.ExitStack() as stack:
        engines = rollout = grader = writer = None
        if driver:
            prepare_run_dir(cfg)
            what = "masked" if cfg.data.overlong_prompts == "mask" else "left out"
            print(
                f"{len(train_prompts)} prompts ({too_long} over-long {what}), {len(eval_prompts)} for evaluation; "
                f"starting {cfg.engine.num_engines} engines",
                flush=True,
            )
            engines = Engines(cfg, local, cuda=device.type == "cuda", stop_token_ids=tokenizer.stop_token_ids)
            stack.callback(engines.stop)
            entry.stop_on_sigterm()
            grader = stack.enter_context(Grader(**dataclasses.asdict(cfg.reward)))
        topo = topology.connect(
            cfg.parallel,
            device=device,
            timeout_s=cfg.collective_timeout_s + cfg.rollout.timeout_s,
            seed=cfg.seed,
            num_threads=cfg.num_threads,
            deterministic=cfg.deterministic,
        )
        policy = Policy(
            local,
            topo,
            precision=cfg.precision,
            temperature=cfg.rollout.temperature,
            optimizer=cfg.optimizer,
            kernels=cfg.kernels,
        )
        reference = (
            FrozenPolicy(local, topo, precision=cfg.precision, temperature=cfg.rollout.temperature, kernels=cfg.kernels)
            if cfg.loss.kl_coef > 0
            else None
        )
        checkpoints = checkpoint.Checkpoints(cfg.run_dir, policy, cfg.checkpoint)
        progress = checkpoints.restore()
        timer = metrics.Timer()
        if driver:
            if progress.step:
                print(f"going on from step {progress.step}", flush=True)
            writer = metrics.Writer(cfg.run_dir, start=progress.step, num_steps=cfg.num_steps)
            stack.callback(writer.close)
            timer = metrics.Timer(writer.phase)
            engines.wait_until_ready()
            stream = prompts.Stream(
                train_prompts,
                cfg.seed if cfg.data.shuffle_seed is None else cfg.data.shuffle_seed,
                skip=cfg.data.skip_prompts,
            )
            rollout = Rollout(engines, stream, tokenizer, grader, cfg, cursor=progress.cursor)
            stack.callback(rollout.close)
        preemption = entry.Preemption()
        preemption.listen(driver)
        canary = [p.token_ids[:CANARY_TOKENS] for p in train_prompts[:NUM_CANARIES]]
        yield Run(
            cfg,
            topo,
            tokenizer,
            eval_prompts,
            policy,
            reference,
            progress,
            Refit(policy, engines, cfg, topo, canary),
            checkpoints,
            preemption,
            timer,
            engines,
            rollout,
            grader,
            writer,
            progress.seconds,
            last_step(cfg, progress.step, topo),
        )
        topology.disconnect()


def check_lengths(cfg: config.Config, hf_config) -> None:
    if cfg.longest_tokens > hf_config.max_position_embeddings:
        raise config.InputError(
            "rollout.max_response_tokens",
            cfg.rollout.max_response_tokens,
            f"with data.max_prompt_tokens = {cfg.data.max_prompt_tokens} makes {cfg.longest_tokens} tokens; the "
            f"model was made for {hf_config.max_position_embeddings}",
            "shorten one of them",
        )


def prepare_run_dir(cfg: config.Config) -> None:
    """Makes the folder and saves the resolved configuration, and for each start what it ran with. Raises InputError if
    it cannot be written."""
    try:
        Path(cfg.run_dir).mkdir(parents=True, exist_ok=True)
        (Path(cfg.run_dir) / "config.yaml").write_text(config_file.to_yaml(cfg))
        with (Path(cfg.run_dir) / "provenance.jsonl").open("a") as f:
            f.write(json.dumps(provenance()) + "\n")
    except OSError as e:
        raise config.InputError(
            "run_dir", cfg.run_dir, f"cannot be written ({e.strerror})", "name another folder"
        ) from e


def summarize(run: Run) -> None:
    """RUN/curves.png, RUN/summary.json, and three lines of it on the console."""
    evals = [row for row in metrics.read(run.cfg.run_dir) if "eval/standard_error" in row]
    key = f"eval/mean@{run.cfg.eval.samples_per_prompt}"
    summary = {
        "eval_before": evals[0][key] if evals else None,
        "eval_after": evals[-1][key] if evals else None,
        "seconds": round(run.seconds(), 1),
        "curve_png": str(curves.draw(run.cfg.run_dir)),
    }
    (Path(run.cfg.run_dir) / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    show_summary(summary)


def show_summary(summary: dict) -> None:
    if summary["eval_before"] is not None:
        print(f"held-out accuracy: {summary['eval_before']:.3f} before, {summary['eval_after']:.3f} after")
    print(f"wall clock: {summary['seconds']:.0f} s")
    print(f"curves: {summary['curve_png']}", flush=True)


def main(cfg: config.Config) -> None:
    """From a checked configuration to a trained policy; a finished run is only summarised again."""
    done = checkpoint.published(cfg.run_dir)
    summary = Path(cfg.run_dir) / "summary.json"
    step = checkpoint.progress_of(done[0]).step if done else 0
    why = stop.reason(cfg.stop, metrics.read(cfg.run_dir), step)
    if done and summary.is_file() and (step >= cfg.num_steps or why):
        if topology.rank() == 0:
            print(
                f"{cfg.run_dir} is finished: step {step} of {cfg.num_steps}{f' ({why})' if why else ''}. "
                f"Remove the folder, name another run_dir, or {'change the stop rule' if why else 'raise num_steps'}."
            )
            show_summary(json.loads(summary.read_text()))
        return
    make_model(cfg)
    with open_run(cfg) as run:
        train(run)
        if run.topology.is_driver:
            summarize(run)


def make_model(cfg: config.Config) -> None:
    """The warm start, if there is one and it has not been made; other ranks wait for it. Raises InputError."""
    if cfg.warm_start is None:
        return
    if topology.rank() != 0:
        topology.wait_for_file(Path(cfg.model) / "config.json", cfg.collective_timeout_s)
        return
    for name, source in (("data.train", cfg.data.train), ("eval.data", cfg.eval.data)):
        if source:
            prompts.read_rows(source, cfg.data, name)  # what is wrong with them should not wait for the warm start
    warm_start.ensure(cfg)
