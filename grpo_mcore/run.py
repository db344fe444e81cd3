"""Makes the parts of a run, closes them again whatever happens, and says where the run ends."""

import contextlib
import functools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from grpo_mcore import entry
from grpo_mcore.checkpoint import checkpoint
from grpo_mcore.config import config, data_sources, rules
from grpo_mcore.data import prompts, rows, sources
from grpo_mcore.environment.environments import tools_of
from grpo_mcore.loss.loss import OverRanks, is_pointwise
from grpo_mcore.parallel import collectives, topology
from grpo_mcore.parallel.topology import Topology
from grpo_mcore.policy import hf_weights, model, warm_start
from grpo_mcore.policy.model_folder import local_folder
from grpo_mcore.policy.policy import FrozenPolicy, Policy
from grpo_mcore.refit.refit import Refit
from grpo_mcore.report import claim, curves, run_folder, sinks
from grpo_mcore.report.provenance import provenance
from grpo_mcore.reward import golds
from grpo_mcore.reward.rewards import Rewards
from grpo_mcore.rollout.engines import Engines
from grpo_mcore.rollout.rollout import Rollout, try_functions
from grpo_mcore.rollout.turns import Turns, open_turns
from grpo_mcore.types import Prompt

NUM_CANARIES, CANARY_TOKENS = 4, 64


@dataclass
class Driver:
    """What rank 0 alone has: engines, what they sample, its grades, and where metrics go."""

    engines: Engines
    rollout: Rollout
    rewards: Rewards
    turns: Turns | None  # with an environment
    writer: sinks.Writer
    eval_prompts: list[Prompt]
    num_left_out: int  # problems of eval.data that are over-long
    evaluated: int = -1  # the step whose policy was evaluated last


@dataclass
class Run:
    """The parts of a run on this rank."""

    cfg: config.Config
    topology: Topology
    tokenizer: prompts.Tokenizer
    policy: Policy
    reference: FrozenPolicy | None
    refit: Refit
    checkpoints: checkpoint.Checkpoints
    progress: checkpoint.Progress
    preemption: entry.Preemption
    timer: sinks.Timer
    driver: Driver | None
    seconds_before: float  # wall clock of the run's earlier processes
    last_step: int  # num_steps, or where the stop rule ends the run

    @property
    def over_ranks(self) -> OverRanks:
        return functools.partial(collectives.sum_over_context, topology=self.topology)

    def seconds(self) -> float:
        """Wall clock of the run so far, imports included."""
        return self.seconds_before + time.monotonic() - entry.BEGAN

    @contextlib.contextmanager
    def gpus_lent(self) -> Iterator[None]:
        """Engines on the trainers' GPUs: they are woken by the refit within, and sample with the memory that the
        trainer can do without. Elsewhere nothing. Collective."""
        engine = self.cfg.engine
        if not engine.is_colocated(self.topology.device.type):
            yield
            return
        self.policy.offload(engine.offload_trainer)
        torch.cuda.empty_cache()  # what is free here is not free there, until then
        yield
        if self.driver is not None:
            self.driver.engines.sleep(self.cfg.refit.timeout_s)
        collectives.broadcast(None, self.topology)  # not before they are asleep
        self.policy.onload(engine.offload_trainer)


@dataclass(frozen=True)
class Inputs:
    """What a run is given besides its configuration."""

    folder: str  # the model's, on this machine
    tokenizer: prompts.Tokenizer
    train_prompts: list[Prompt]
    num_overlong: int
    eval_prompts: list[Prompt]
    num_left_out: int  # problems of eval.data that are over-long
    device: torch.device


def read_inputs(cfg: config.Config) -> Inputs:
    """Raises InputError for what is wrong with model, data or device, before anything expensive starts."""
    folder, _ = read_model(cfg)
    tokenizer = prompts.Tokenizer(folder)
    tokenizer.tools = tools_of(cfg)
    train_prompts, num_overlong = read_train_prompts(cfg, tokenizer)
    eval_prompts, num_left_out = prompts.load_evaluation(cfg, tokenizer) if cfg.eval.data else ([], 0)
    if topology.rank() == 0:
        of_training = prompts.answers_by_source(cfg, "data.train", train_prompts)
        of_evaluation = prompts.answers_by_source(cfg, "eval.data", eval_prompts)
        for name, each in (of_training | of_evaluation).items():
            if warning := check_answers(cfg, name, each):
                print(warning, flush=True)
        try_functions(cfg.reward, train_prompts)
    device = topology.pick_device(cfg.device)
    rules.check_device(cfg, device.type)
    model.check_attention(cfg, device)
    return Inputs(folder, tokenizer, train_prompts, num_overlong, eval_prompts, num_left_out, device)


def read_model(cfg: config.Config) -> tuple[str, model.HFConfig]:
    """Its folder and config. Raises InputError."""
    folder = local_folder(cfg.model)
    hf_config = model.load_hf_config(folder)
    model.check_parallel(hf_config, cfg.parallel, cfg.precision)
    check_lengths(cfg, hf_config)
    hf_weights.check(folder, hf_config)
    return folder, hf_config


def read_train_prompts(cfg: config.Config, tokenizer: prompts.Tokenizer) -> tuple[list[Prompt], int]:
    """(prompts, how many of them are over-long, or were). Raises InputError."""
    overlong, is_graded = cfg.data.overlong_prompts, bool(cfg.reward.verifiers)
    return prompts.load(cfg.data.train, cfg.data, tokenizer, "data.train", overlong=overlong, is_graded=is_graded)


def check_answers(cfg: config.Config, name: str, answers: Sequence[str]) -> str | None:
    """What to say of the right answers of a source, if some can never be given. Raises InputError if none can."""
    (path,) = (s.path for s in data_sources.of(cfg) if s.field == name)
    return golds.check(answers, cfg.reward, name, path)


@contextlib.contextmanager
def open_run(cfg: config.Config) -> Iterator[Run]:
    """Everything `train` needs. Raises InputError."""
    given = read_inputs(cfg)
    with contextlib.ExitStack() as stack:
        # Engines start while the policy is built, or, on the trainers' own GPUs, before it.
        in_turns = cfg.engine.is_colocated(given.device.type)
        engines = start_engines(cfg, given, stack) if topology.rank() == 0 and not in_turns else None
        topo = topology.connect(
            cfg.parallel,
            device=given.device,
            timeout_s=cfg.collective_timeout_s + cfg.rollout.timeout_s,
            seed=cfg.seed,
            num_threads=cfg.num_threads,
            deterministic=cfg.deterministic,
        )
        if in_turns:
            engines = start_asleep(cfg, given, topo, stack)
        precision, temperature, kernels = cfg.precision, cfg.rollout.temperature, cfg.kernels
        pointwise = is_pointwise(cfg.loss)
        policy = Policy(
            given.folder,
            topo,
            precision=precision,
            temperature=temperature,
            optimizer=cfg.optimizer,
            kernels=kernels,
            pointwise=pointwise,
        )
        reference = None
        if cfg.loss.kl_coef > 0:
            reference = FrozenPolicy(
                given.folder, topo, precision=precision, temperature=temperature, kernels=kernels, pointwise=pointwise
            )
        checkpoints = checkpoint.Checkpoints(cfg.run_dir, policy, cfg.checkpoint)
        progress = checkpoints.restore()
        driver = open_driver(cfg, given, engines, progress, stack) if engines is not None else None
        preemption = entry.Preemption()
        preemption.listen(driver is not None)
        canary = [p.token_ids[:CANARY_TOKENS] for p in given.train_prompts[:NUM_CANARIES]]
        yield Run(
            cfg=cfg,
            topology=topo,
            tokenizer=given.tokenizer,
            policy=policy,
            reference=reference,
            refit=Refit(policy, engines, cfg, topo, canary),
            checkpoints=checkpoints,
            progress=progress,
            preemption=preemption,
            timer=sinks.Timer(driver.writer.phase) if driver else sinks.Timer(),
            driver=driver,
            seconds_before=progress.seconds,
            last_step=last_step(cfg, progress.step, topo),
        )
        topology.disconnect()


def start_engines(cfg: config.Config, given: Inputs, stack: contextlib.ExitStack) -> Engines:
    stack.enter_context(claim.claimed(cfg.run_dir))
    prepare_run_dir(cfg, given)
    what = "masked" if cfg.data.overlong_prompts == "mask" else "left out"
    print(
        f"{len(given.train_prompts)} prompts ({given.num_overlong} over-long {what}), {len(given.eval_prompts)} for "
        f"evaluation ({given.num_left_out} over-long left out); starting {cfg.engine.num_engines} engines",
        flush=True,
    )
    cuda = given.device.type == "cuda"
    engines = Engines(cfg, given.folder, cuda=cuda, stop_token_ids=given.tokenizer.stop_token_ids)
    stack.callback(engines.stop)
    entry.stop_on_sigterm()
    return engines


def start_asleep(cfg: config.Config, given: Inputs, topo: Topology, stack: contextlib.ExitStack) -> Engines | None:
    """Engines on the trainers' GPUs measure how much memory they may take. Meanwhile the trainers hold what CUDA takes
    for itself, and nothing else; afterwards the engines sleep. Collective. Raises InputError, EngineError."""
    engines = None
    if topo.is_driver:
        engines = start_engines(cfg, given, stack)
        engines.wait_until_ready()
    collectives.broadcast(None, topo)
    return engines


def open_driver(
    cfg: config.Config, given: Inputs, engines: Engines, progress: checkpoint.Progress, stack: contextlib.ExitStack
) -> Driver:
    """Waits for the engines."""
    if progress.step:
        print(f"going on from step {progress.step}", flush=True)
    rewards = stack.enter_context(Rewards(cfg.reward))
    writer = sinks.Writer(cfg.run_dir, start=progress.step, num_steps=cfg.num_steps)
    stack.callback(writer.close)
    engines.wait_until_ready()
    shuffle_seed = cfg.seed if cfg.data.shuffle_seed is None else cfg.data.shuffle_seed
    weights = data_sources.weights(cfg.data.train)
    stream = prompts.Stream(given.train_prompts, shuffle_seed, skip=cfg.data.skip_prompts, weights=weights)
    turns = open_turns(cfg, engines, given.tokenizer, stack)
    rollout = Rollout(
        engines, stream, given.tokenizer, rewards, cfg, cursor=progress.cursor, left_out=progress.left_out, turns=turns
    )
    stack.callback(rollout.close)
    return Driver(engines, rollout, rewards, turns, writer, given.eval_prompts, given.num_left_out)


def check_lengths(cfg: config.Config, hf_config) -> None:
    if cfg.longest_tokens > hf_config.max_position_embeddings:
        raise config.InputError(
            "rollout.max_response_tokens",
            cfg.rollout.max_response_tokens,
            f"with data.max_prompt_tokens = {cfg.data.max_prompt_tokens} makes {cfg.longest_tokens} tokens; the model "
            f"was made for {hf_config.max_position_embeddings}",
            "shorten one of them",
        )


def prepare_run_dir(cfg: config.Config, given: Inputs) -> None:
    """Saves the resolved configuration, and for each start what it ran with; says what has changed since the last one.
    Raises InputError, with nothing written, if the run cannot go on as it is asked to."""
    step = checkpoint.newest_step(cfg.run_dir)
    now = contents(cfg, given.folder, given.train_prompts)
    for change in claim.changes(cfg, step, now):
        print(f"changed since the last start: {change}", flush=True)
    checkpoint.check_room(cfg, model.load_hf_config(given.folder))
    claim.record(cfg, now)
    with (Path(cfg.run_dir) / "provenance.jsonl").open("a") as f:
        f.write(json.dumps(provenance()) + "\n")


def contents(cfg: config.Config, folder: str, train_prompts: Sequence[Prompt]) -> dict[str, str]:
    """Digests of what a run is made of, by key."""
    weights = data_sources.weights(cfg.data.train)
    return {"model": claim.folder_digest(folder), "data.train": prompts.digest(train_prompts, weights)}


def make_model(cfg: config.Config) -> None:
    """The warm start, if there is one and it has not been made; other ranks wait for it. Raises InputError."""
    if cfg.warm_start is None:
        return
    if topology.rank() != 0:
        topology.wait_for_file(Path(cfg.model) / "config.json", cfg.collective_timeout_s)
        return
    if not warm_start.is_made(cfg):
        check_rows(cfg)  # what is wrong with them should not wait for it
    warm_start.ensure(cfg)


def check_rows(cfg: config.Config) -> None:
    """Before there is a tokenizer. Raises InputError for a row that cannot be used, and for answers of which none can
    be right."""
    for name, each in read_rows(cfg).items():
        check_answers(cfg, name, [row.answer for row in each])


def read_rows(cfg: config.Config) -> dict[str, list[rows.Row]]:
    """Of each source, by its key (data.train, or of several data.train[1]). Raises InputError for a row that cannot be
    used."""
    return {source.field: sources.read_source(source) for source in data_sources.of(cfg)}


# Where a run ends.


def is_finished(cfg: config.Config) -> bool:
    """Whether the run is at its end and summarised; the driver then says so, and shows the summary again."""
    summary, step = Path(cfg.run_dir) / "summary.json", checkpoint.newest_step(cfg.run_dir)
    why = stop_reason(cfg.stop, run_folder.read_metrics(cfg.run_dir), step)
    if not (step and summary.is_file() and (step >= cfg.num_steps or why)):
        return False
    if topology.rank() == 0:
        print(
            f"{cfg.run_dir} is finished: step {step} of {cfg.num_steps}{f' ({why})' if why else ''}. "
            f"Remove the folder, name another run_dir, or {'change the stop rule' if why else 'raise num_steps'}."
        )
        show_summary(json.loads(summary.read_text()))
    return True


def last_step(cfg: config.Config, step: int, topology: Topology) -> int:
    """Where the run ends, as its metrics tell after `step` steps. Collective."""
    if cfg.stop == config.Stop():
        return cfg.num_steps
    why = stop_reason(cfg.stop, run_folder.read_metrics(cfg.run_dir), step) if topology.is_driver and step else None
    if why:
        print(f"the stop rule ends the run after {step} steps: {why}", flush=True)
    return collectives.broadcast(step if why else cfg.num_steps, topology)


TRUNCATED = "rollout/truncated_frac"


def stop_reason(rule: config.Stop, rows: Sequence[dict], step: int) -> str | None:
    """Why the run ends after `step` steps, or None.

    What is known then are the rows of those steps and the evaluations before the last of them: later rows do not count,
    so that a run that is taken up again is judged as it was.
    """
    if step < max(rule.after_steps, 1):
        return None
    known = [row for row in rows if row["step"] < step or (row["step"] == step and TRUNCATED in row)]
    return _plateau(rule, known) or _truncated(rule, known)


def _plateau(rule: config.Stop, rows: Sequence[dict]) -> str | None:
    if rule.plateau_window is None:
        return None
    n, values = rule.plateau_window, run_folder.numbers(rows, rule.plateau_metric)
    if len(values) < 2 * n:
        return None
    before, last = sum(values[-2 * n : -n]) / n, sum(values[-n:]) / n
    if last - before > rule.plateau_min_gain:
        return None
    return (
        f"{rule.plateau_metric} went from {before:.4g} to {last:.4g}, means of {n} values, and "
        f"stop.plateau_min_gain is {rule.plateau_min_gain:g}"
    )


def _truncated(rule: config.Stop, rows: Sequence[dict]) -> str | None:
    if rule.truncated_above is None:
        return None
    values = run_folder.numbers(rows, TRUNCATED)[-rule.truncated_steps :]
    if len(values) < rule.truncated_steps or min(values) <= rule.truncated_above:
        return None
    return (
        f"{TRUNCATED} was {min(values):.4g} or more in {len(values)} steps, and stop.truncated_above is "
        f"{rule.truncated_above:g}"
    )


def summarize(run: Run) -> None:
    """RUN/curves.png, RUN/summary.json, and three lines of it on the console."""
    # Of any k: eval.samples_per_prompt may have changed between starts.
    means = [
        v for row in run_folder.read_metrics(run.cfg.run_dir) for k, v in row.items() if k.startswith("eval/mean@")
    ]
    summary = {
        "eval_before": means[0] if means else None,
        "eval_after": means[-1] if means else None,
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
