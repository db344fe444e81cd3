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

from grpo_mcore import advantage, batch, checkpoint, config, config_file, curves, entry, loss, metrics, model, prompts, reward, rules, shaping, warm_start
from grpo_mcore.engine import Engines, EnginesLost
from grpo_mcore.evaluate import evaluate, grade
from grpo_mcore.hf_weights import local_folder
from grpo_mcore.parallel import collectives, topology
from grpo_mcore.parallel.topology import Topology
from grpo_mcore.policy import FrozenPolicy, Policy, learning_rate
from grpo_mcore.refit import Refit
from grpo_mcore.rollout import rollout
from grpo_mcore.types import GlobalBatch, Group

NUM_CANARIES, CANARY_TOKENS = 4, 64
ENGINES_LOST = "engines lost"


@dataclass
class Run:
    """The parts of a run on this rank. Engines, grader and writer are the driver's alone (None elsewhere)."""

    cfg: config.Config
    topology: Topology
    tokenizer: prompts.Tokenizer
    stream: prompts.Stream
    eval_prompts: list
    policy: Policy
    reference: FrozenPolicy | None
    progress: checkpoint.Progress
    refit: Refit
    checkpoints: checkpoint.Checkpoints
    preemption: entry.Preemption
    timer: metrics.Timer
    engines: Engines | None
    grader: reward.Grader | None
    writer: metrics.Writer | None
    seconds_before: float  # wall clock of the run's earlier processes

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
        with time_of("refit"):
            refit_metrics = run.refit(version=step)
        if cfg.eval.data and (step % cfg.eval.every == 0 or step == cfg.num_steps):
            with time_of("eval"):
                run.preemption.unless_asked(lambda: evaluate_and_write(run, step))
        if step == cfg.num_steps:
            break
        work = collectives.broadcast(sample_and_grade(run, step), run.topology)
        if work is None:
            return leave(run)
        if work == ENGINES_LOST:  # the same step again, with those that take their place
            run.stream.cursor = run.progress.cursor
            continue
        groups, rewards_PG, verdicts = work
        advantages_PG = advantage.group_advantages(shaping.shaped(rewards_PG, groups, cfg.shaping, cfg.rollout.max_response_tokens), **dataclasses.asdict(cfg.advantage))
        batches = assemble(run, groups, advantages_PG)
        with time_of("logprob"):
            mismatch = score(run, batches)
        with time_of("update"):
            lr = learning_rate(cfg.optimizer, step, cfg.num_steps)
            updates = [run.policy.update(b, functools.partial(loss.grpo, cfg=cfg.loss, over_ranks=over_ranks), lr=lr) for b in batches]
        run.progress = checkpoint.Progress(step + 1, run.stream.cursor, run.seconds())
        write_step(run, groups, verdicts, refit_metrics, [mismatch, *updates], batches, lr)
        with time_of("checkpoint"):
            run.checkpoints.poll()
            if cfg.checkpoint.every and ((step + 1) % cfg.checkpoint.every == 0 or step + 1 == cfg.num_steps):
                run.checkpoints.save(run.progress)
    run.checkpoints.wait()
    if run.preemption.asked:  # on the driver, whose last evaluation may be missing
        raise entry.Preempted("stopped by SIGTERM after the last step; the same command evaluates it")


def sample_and_grade(run: Run, step: int) -> tuple[list[Group], list, list] | str | None:
    """(groups, rewards_PG, verdicts) on the driver, or ENGINES_LOST, or None if SIGTERM came; elsewhere None. Every rank moves its prompt cursor."""
    drawn = run.stream.next(run.cfg.rollout.prompts_per_step)
    if run.engines is None:
        return None

    def work():
        try:
            with run.timer("rollout"):
                groups = sample(run, drawn, step)
        except EnginesLost:
            return ENGINES_LOST
        with run.timer("reward"):
            return groups, *grade(groups, run.tokenizer, run.grader)

    return run.preemption.unless_asked(work)


def leave(run: Run) -> None:
    """Saves the last completed step, whose weights no update has touched yet, and ends the run."""
    if run.progress.step > run.checkpoints.newest_step:
        run.checkpoints.save(run.progress)
    run.checkpoints.wait()
    saved = f"step {run.progress.step} is saved" if run.progress.step else "no step was completed"
    raise entry.Preempted(f"stopped by SIGTERM: {saved}; the same command goes on from there")


def sample(run: Run, drawn: list, step: int) -> list[Group]:
    """The step's groups, from the engines."""
    r = run.cfg.rollout
    return rollout(run.engines, drawn, group_size=r.group_size, temperature=r.temperature, max_tokens=r.max_response_tokens, seed=run.cfg.seed, version=step)


def assemble(run: Run, groups: list[Group], advantages_PG: torch.Tensor) -> list[GlobalBatch]:
    """One GlobalBatch per optimizer step: this rank's part."""
    cfg = run.cfg
    return batch.assemble(
        groups, advantages_PG, global_batch_size=cfg.batch.global_batch_size, aggregation=cfg.loss.aggregation, max_response_tokens=cfg.rollout.max_response_tokens,
        skip_truncated=cfg.loss.skip_truncated,
        packing=model.packing(run.policy.hf_config, run.topology, cfg.precision, max_tokens=cfg.batch.max_tokens_per_microbatch))


def score(run: Run, batches: list[GlobalBatch]) -> dict[str, metrics.Metric]:
    """Fills in old and reference log-probs and importance weights of all batches, before the first update; returns how far the engines' log-probs differ."""
    parts = []
    for b in batches:
        for m, logprobs_R in zip(b.microbatches, run.policy.logprobs(b.microbatches), strict=True):
            m.old_logprobs_R = logprobs_R
            if logprobs_R is not None:  # the last pipeline stage
                parts.append(metrics.mismatch(m.rollout_logprobs_R, logprobs_R, run.cfg.loss.importance_cap))
                if run.cfg.loss.importance_level != "none":
                    m.importance_R, beyond_R = loss.importance(m, run.cfg.loss, functools.partial(collectives.sum_over_context, topology=run.topology))
                    parts.append(metrics.importance(m.importance_R, beyond_R))
        if run.reference is not None:
            for m, logprobs_R in zip(b.microbatches, run.reference.logprobs(b.microbatches), strict=True):
                m.ref_logprobs_R = logprobs_R
    return metrics.merge(parts)


def evaluate_and_write(run: Run, step: int) -> None:
    if run.engines is None:
        return
    result = evaluate(run.engines, run.eval_prompts, run.tokenizer, run.grader, run.cfg, version=step)
    run.writer.write(step, result.metrics())
    run.writer.say(f"evaluation after {step} steps: {result}")


def write_step(run: Run, groups: list[Group], verdicts: list[reward.Verdict], refit_metrics: dict, parts: list[dict], batches: list[GlobalBatch], lr: float) -> None:
    """One row of metrics, of all ranks. Collective."""
    mine = metrics.merge(parts) if run.topology.reports else {}
    merged = metrics.merge([refit_metrics, *collectives.gather(mine, run.topology)])
    if run.writer is None:
        return
    rewards = [v.reward for v in verdicts]
    groups_of_rewards = [rewards[i : i + len(groups[0].responses)] for i in range(0, len(rewards), len(groups[0].responses))]
    lengths = [len(r.token_ids) for g in groups for r in g.responses]
    disputes = {}
    if run.cfg.reward.compare_verifiers:
        golds = [g.prompt.answer for g in groups for _ in g.responses]
        disputes["reward/disagree"] = float(reward.append_disputes(Path(run.cfg.run_dir) / "disputes.jsonl", run.progress.step, golds, verdicts))
    times = run.timer.drain()
    row = {
        "reward/mean": sum(rewards) / len(rewards),
        "reward/mixed_groups_frac": sum(len(set(g)) > 1 for g in groups_of_rewards) / len(groups),
        **{f"reward/{status}": float(count) for status, count in reward.counts(verdicts).items()},
        **disputes,
        "rollout/response_tokens_mean": sum(lengths) / len(lengths),
        "rollout/response_tokens_max": float(max(lengths)),
        "rollout/truncated_frac": sum(r.truncated for g in groups for r in g.responses) / len(lengths),
        **{name: metric.value for name, metric in sorted(merged.items())},
        "update/lr": lr,
        "update/microbatches": float(sum(len(b.microbatches) for b in batches)),
        "update/packed_frac": sum(b.packed_frac for b in batches) / len(batches),
        "update/imbalance": max(b.imbalance for b in batches),
        **times,
        "tokens_per_s": sum(b.num_tokens for b in batches) / sum(s for name, s in times.items() if name not in ("time/eval_s", "time/checkpoint_s")),
    }
    run.writer.write(run.progress.step, row)
    run.writer.show(run.progress.step, row)


@contextlib.contextmanager
def open_run(cfg: config.Config) -> Iterator[Run]:
    """Everything `train` needs. What can be wrong with the input is found before anything expensive starts."""
    hf_config = model.load_hf_config(local := local_folder(cfg.model))
    model.check_parallel(hf_config, cfg.parallel, cfg.precision)
    check_lengths(cfg, hf_config)
    tokenizer = prompts.Tokenizer(local)
    train_prompts, too_long = prompts.load(cfg.data.train, cfg.data, tokenizer, "data.train")
    eval_prompts = prompts.load(cfg.eval.data, cfg.data, tokenizer, "eval.data")[0][: cfg.eval.max_prompts] if cfg.eval.data else []
    device = topology.pick_device(cfg.device)
    rules.check_device(cfg, device.type)
    driver = topology.rank() == 0
    with contextlib.ExitStack() as stack:
        engines = grader = writer = None
        if driver:
            prepare_run_dir(cfg)
            print(f"{len(train_prompts)} prompts ({too_long} over-long left out), {len(eval_prompts)} for evaluation; starting {cfg.engine.num_engines} engines", flush=True)
            engines = Engines(cfg, local, cuda=device.type == "cuda", stop_token_ids=tokenizer.stop_token_ids)
            stack.callback(engines.stop)
            entry.stop_on_sigterm()
            grader = stack.enter_context(reward.Grader(**dataclasses.asdict(cfg.reward)))
        topo = topology.connect(
            cfg.parallel, device=device, timeout_s=cfg.collective_timeout_s + cfg.rollout.timeout_s,
            seed=cfg.seed, num_threads=cfg.num_threads, deterministic=cfg.deterministic)
        policy = Policy(local, topo, precision=cfg.precision, temperature=cfg.rollout.temperature, optimizer=cfg.optimizer, kernels=cfg.kernels)
        reference = FrozenPolicy(local, topo, precision=cfg.precision, temperature=cfg.rollout.temperature, kernels=cfg.kernels) if cfg.loss.kl_coef > 0 else None
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
        preemption = entry.Preemption()
        preemption.listen(driver)
        canary = [p.token_ids[:CANARY_TOKENS] for p in train_prompts[:NUM_CANARIES]]
        yield Run(
            cfg, topo, tokenizer, prompts.Stream(train_prompts, cfg.seed, progress.cursor), eval_prompts, policy, reference,
            progress, Refit(policy, engines, cfg, topo, canary), checkpoints, preemption, timer, engines, grader, writer, progress.seconds)
        topology.disconnect()


def check_lengths(cfg: config.Config, hf_config) -> None:
    if cfg.max_total_tokens > hf_config.max_position_embeddings:
        raise config.InputError(
            "rollout.max_response_tokens", cfg.rollout.max_response_tokens,
            f"with data.max_prompt_tokens = {cfg.data.max_prompt_tokens} makes {cfg.max_total_tokens} tokens; the model was made for {hf_config.max_position_embeddings}",
            "shorten one of them")


def prepare_run_dir(cfg: config.Config) -> None:
    """Makes the folder and saves the resolved configuration. Raises InputError if it cannot be written."""
    try:
        Path(cfg.run_dir).mkdir(parents=True, exist_ok=True)
        (Path(cfg.run_dir) / "config.yaml").write_text(config_file.to_yaml(cfg))
    except OSError as e:
        raise config.InputError("run_dir", cfg.run_dir, f"cannot be written ({e.strerror})", "name another folder") from e


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
    if done and summary.is_file() and checkpoint.progress_of(done[0]).step >= cfg.num_steps:
        if topology.rank() == 0:
            print(f"{cfg.run_dir} is finished: step {cfg.num_steps} of {cfg.num_steps}. Remove the folder, name another run_dir, or raise num_steps.")
            show_summary(json.loads(summary.read_text()))
        return
    if cfg.warm_start is not None:
        if topology.rank() == 0:
            for name, source in (("data.train", cfg.data.train), ("eval.data", cfg.eval.data)):
                if source:
                    prompts.read_rows(source, cfg.data, name)  # what is wrong with them should not wait for the warm start
            warm_start.ensure(cfg)
        else:
            topology.wait_for_file(Path(cfg.model) / "config.json", cfg.collective_timeout_s)
    with open_run(cfg) as run:
        train(run)
        if run.topology.is_driver:
            summarize(run)
