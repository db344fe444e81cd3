"""The actions of a stage, each a command that a user could type, and what came of them. See stages.py."""

import contextlib
import dataclasses
import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from grpo_mcore import entry
from grpo_mcore.checkpoint import checkpoint
from grpo_mcore.checkpoint.parity import folder_digest
from grpo_mcore.config.config import Config, InputError
from grpo_mcore.evaluate import evaluate, scores
from grpo_mcore.policy.model_folder import local_folder
from grpo_mcore.report import run_folder
from grpo_mcore.run import check_rows, stop_reason
from grpo_mcore.stages import stages
from grpo_mcore.stages.lineage import FILE, Lineage, check_unchanged, next_action, plain
from grpo_mcore.stages.stages import Plan, Stage

CONVERT_TIMEOUT_S = 6 * 3600  # of an export and of its proof, which wait for nobody but the disk
STOPPED_TIMEOUT_S = 3600  # of a command that was told to save and leave


class ActionFailed(RuntimeError):
    """A command ended in another way than it should; it has said why. `code` is its exit code."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


@dataclasses.dataclass(frozen=True)
class Launcher:
    """How a stage's programs are started."""

    programs: Path  # the folder of train.py, convert.py and evaluate.py
    ranks: int
    torchrun: tuple[str, ...] = ()  # further arguments of it

    def program(self, name: str, *args: str) -> list[str]:
        return [sys.executable, str(self.programs / name), *args]

    def train(self, *args: str) -> list[str]:
        if self.ranks == 1 and not self.torchrun:
            return self.program("train.py", *args)
        how = self.torchrun or ("--standalone",)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(self.ranks), *how]
        return [*torchrun, str(self.programs / "train.py"), *args]


@dataclasses.dataclass(frozen=True)
class Work:
    """A stage at work; its configuration is read once."""

    plan: Plan
    launcher: Launcher
    number: int
    before: dict | None  # the record of the stage before
    taken: list[str]  # overrides: what it takes over from that one
    config: Config  # of its training
    record: dict

    @property
    def stage(self) -> Stage:
        return self.plan.file.stages[self.number]

    @property
    def cfg(self) -> str:
        return str(self.plan.config_path(self.number))

    def overrides(self, *, evaluation: bool = False) -> list[str]:
        return self.plan.overrides(self.number, self.taken, evaluation=evaluation)

    def execute(self, command: list[str], what: str, timeout_s: float | None = None) -> str:
        """See `execute`. Returns the command as one types it."""
        execute(command, f"stage {self.stage.name}: {what}", timeout_s)
        return shlex.join(command)


def run(plan: Plan, launcher: Launcher, redo_from: int | None = None) -> None:
    """Every action that is not finished, stage by stage. Raises InputError, ActionFailed, entry.Preempted."""
    with alone(plan.dir):
        lineage = Lineage(plan.dir)
        if redo_from is not None:
            forget(plan, lineage, redo_from - 1)
        check(plan, lineage)
        check_data(plan, lineage)
        go_on(plan, launcher, lineage)
    print(summary(lineage), flush=True)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds DIR/lock, which the commands inherit: it is held as long as one of them lives. Raises InputError if others
    hold it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise InputError(
                "dir",
                str(folder),
                "is being worked on by another launch/stages.py, or by a command that one has started",
                "wait until it ends, or stop it",
            ) from e
        os.set_inheritable(f.fileno(), True)
        yield


def go_on(plan: Plan, launcher: Launcher, lineage: Lineage) -> None:
    for number, stage in enumerate(plan.file.stages):
        before = lineage.stages[number - 1] if number else None
        taken = overrides_of(plan, lineage, number)
        config = plan.config(number, taken)
        record = lineage.stages[number] if number < len(lineage.stages) else None
        if record is None or "train" not in record:
            check_run_dir(config)
            record = lineage.begin(stage.name, plain(stage), config, taken_over(stage, config, before, taken))
        work = Work(plan, launcher, number, before, taken, config, record)
        while (action := next_action(record)) is not None:
            print(f"stage {stage.name}: {action}", flush=True)
            began = time.monotonic()
            result = DO[action](work)
            lineage.finish(record, action, {**result, "seconds": round(time.monotonic() - began, 1)})


def check(plan: Plan, lineage: Lineage) -> None:
    """Whether the lineage is this plan's, before anything starts. Raises InputError."""
    if len(lineage.stages) > len(plan.file.stages):
        raise InputError(
            "stages",
            len(plan.file.stages),
            f"are fewer than the {len(lineage.stages)} of {plan.dir / FILE}",
            "put them back, or name another dir",
        )
    stray = [
        p for number in range(len(lineage.stages), len(plan.file.stages)) if (p := plan.export_of(number)).exists()
    ]
    if stray:
        raise InputError(
            "dir",
            plan.file.dir,
            f"holds {stray[0].name}, of which its {FILE} knows nothing",
            "remove that folder, or name another dir",
        )
    for number, record in enumerate(lineage.stages):
        check_unchanged(
            record, number, plain(plan.file.stages[number]), plan.config(number, overrides_of(plan, lineage, number))
        )
        if (
            "export" in record
            and next_stage_needs(plan, lineage, number)
            and folder_digest(record["export"]["folder"]) != record["export"]["digest"]
        ):
            raise InputError(
                "dir",
                plan.file.dir,
                f"its {record['export']['folder']} is not what stage {record['name']} exported",
                f"use --redo-from {number + 1}",
            )
    stages.check_model(plan)


def check_data(plan: Plan, lineage: Lineage) -> None:
    """That of all stages that are still to be trained, before the first is. Raises InputError."""
    seen = set()
    for number, stage in enumerate(plan.file.stages):
        if number < len(lineage.stages) and "train" in lineage.stages[number]:
            continue
        for config in (plan.config(number), plan.config(number, evaluation=True)):
            key = dataclasses.replace(config.data, skip_prompts=0), config.eval.data, config.reward
            if key not in seen:
                with stages.naming(stage):
                    check_rows(config)
            seen.add(key)


def next_stage_needs(plan: Plan, lineage: Lineage, number: int) -> bool:
    """Whether a stage's export is still to be used."""
    after = lineage.stages[number + 1] if number + 1 < len(lineage.stages) else {}
    return next_action(lineage.stages[number]) is not None or (
        number + 1 < len(plan.file.stages) and "train" not in after
    )


def check_run_dir(config: Config) -> None:
    """Raises InputError if the run that the folder holds began otherwise than this one."""
    began = run_folder.read_config(config.run_dir)
    if not began or not checkpoint.published(config.run_dir):
        return
    for name, before, now in (
        ("model", began["model"], config.model),
        ("data.skip_prompts", began["data"]["skip_prompts"], config.data.skip_prompts),
    ):
        if before != now:
            raise InputError(
                "run_dir",
                config.run_dir,
                f"holds checkpoints of a run with {name} = {before}, and the stage begins with {now}",
                "name another run_dir, or move that one away",
            )


def overrides_of(plan: Plan, lineage: Lineage, number: int) -> list[str]:
    if number == 0:
        return []
    before = lineage.stages[number - 1]
    return stages.carry_over(
        plan, number, checkpoint=before["choose"]["checkpoint"], prompts_taken=before["choose"]["prompts_taken"]
    )


def taken_over(stage: Stage, config: Config, before: dict | None, taken: list[str]) -> dict:
    """What the record says of how the stage begins."""
    return {
        "overrides": taken,
        "model": config.model,
        "model_digest": before["export"]["digest"] if before else None,
        "reference_policy": stages.reference(config),
        "optimizer": "fresh" if stage.optimizer == "fresh" else f"of {config.checkpoint.start_from}",
        "step": 0,
        "warmup_steps": config.optimizer.warmup_steps,
        "skip_prompts": config.data.skip_prompts,
    }


def train(work: Work) -> dict:
    config = work.config
    command = work.execute(work.launcher.train("--cfg", work.cfg, *work.overrides()), "training")
    found = checkpoint.published(config.run_dir)
    if not found:
        raise ActionFailed(
            f"stage {work.stage.name}: training ended well and left no checkpoint in {config.run_dir}", 1
        )
    if work.number == 0:  # a warm start has made it by now
        work.record["carry_over"]["model_digest"] = folder_digest(local_folder(config.model))
    last = checkpoint.progress_of(found[0])
    why = stop_reason(config.stop, run_folder.read_metrics(config.run_dir), last.step)
    return {
        "command": command,
        "run_dir": config.run_dir,
        "steps": last.step,
        "ended_by": why or f"num_steps = {config.num_steps}",
        "run_seconds": round(last.seconds, 1),
    }


def choose(work: Work) -> dict:
    config = work.config
    if work.stage.choose == "last":
        folder, why = checkpoint.published(config.run_dir)[0], "the last"
    else:
        name = config.checkpoint.best_metric
        ranked = checkpoint.ranked(config.run_dir, name)
        if not ranked:
            raise InputError(
                "checkpoint.best_metric",
                name,
                f"is a number of no checkpoint of {config.run_dir}",
                "choose the last, or name another metric",
            )
        folder, why = ranked[0][0], f"{name} = {ranked[0][1]:.4g}, the highest of {len(ranked)} checkpoints"
    progress = checkpoint.progress_of(folder)
    return {
        "checkpoint": str(folder),
        "step": progress.step,
        "why": why,
        "prompts_taken": config.data.skip_prompts + progress.cursor,
    }


def export(work: Work) -> dict:
    folder, chosen = str(work.plan.export_of(work.number)), work.record["choose"]["checkpoint"]
    shutil.rmtree(folder, ignore_errors=True)  # of an export whose end was not recorded
    program = work.launcher.program("convert.py", "to-hf", "--checkpoint", chosen, "--out", folder)
    command = work.execute(program, "the export", CONVERT_TIMEOUT_S)
    return {"command": command, "folder": folder, "digest": folder_digest(folder)}


def prove(work: Work) -> dict:
    out = work.plan.dir / f"{work.stage.name}_parity.json"
    chosen, folder = work.record["choose"]["checkpoint"], work.record["export"]["folder"]
    program = work.launcher.program("convert.py", "prove", "--checkpoint", chosen, "--hf", folder, "--out", str(out))
    command = work.execute(program, "the proof of its export", CONVERT_TIMEOUT_S)
    return {"command": command, **json.loads(out.read_text())}


def evaluate_export(work: Work) -> dict:
    if work.plan.config(work.number, work.taken, evaluation=True).eval.data is None:
        return {"skipped": "eval.data names nothing"}
    out = str(work.plan.dir / f"{work.stage.name}_eval.json")
    options = ("--cfg", work.cfg, "--model", work.record["export"]["folder"], "--out", out)
    program = work.launcher.program("evaluate.py", *options, *work.overrides(evaluation=True))
    command = work.execute(program, "the evaluation")
    seen = json.loads(Path(out).read_text())
    result = {
        "command": command,
        "file": out,
        **{k: v for k, v in seen.items() if k.startswith("eval/") or k == "num_problems"},
    }
    if work.before and "file" in work.before["evaluate"]:
        mine, other = (evaluate.read_problems(path)[0] for path in (out, work.before["evaluate"]["file"]))
        if {p.key for p in mine} == {p.key for p in other}:
            result["minus_stage_before"] = str(scores.compare(mine, other))
    return result


DO = {"train": train, "choose": choose, "export": export, "prove": prove, "evaluate": evaluate_export}


def execute(command: list[str], what: str, timeout_s: float | None = None) -> None:
    """Runs a command to its end, its output passed through, SIGTERM and Ctrl-C passed on. It ends with this process,
    however that ends.

    Training and evaluation bound their own waits. Raises ActionFailed, entry.Preempted, KeyboardInterrupt.
    """
    print(f"$ {shlex.join(command)}", flush=True)
    # torchrun has processes of its own to end; the other programs' die with them.
    how = signal.SIGTERM if "torch.distributed.run" in command else signal.SIGKILL
    asked: list[int] = []
    process = None

    def pass_on(signum: int, _) -> None:
        asked.append(signum)
        if process is not None:
            process.send_signal(signum)

    former = {signum: signal.signal(signum, pass_on) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        # A session of its own: the terminal's Ctrl-C comes once, by pass_on.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            close_fds=False,  # Python's own are not inherited, but the lock's is
            preexec_fn=lambda: entry.die_with_parent(how),
        )
        if asked:
            process.send_signal(asked[0])
        code = _wait(process, asked, timeout_s, what)
    finally:
        if process is not None and process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for signum, handler in former.items():
            signal.signal(signum, handler)
    if signal.SIGTERM in asked or code == 143:
        raise entry.Preempted(f"{what} was stopped by SIGTERM; the same command goes on from there")
    if signal.SIGINT in asked or code == 130:
        raise KeyboardInterrupt
    if code:
        raise ActionFailed(
            f"{what} ended with {code}; its own words stand above. When that is mended, the same command goes on "
            f"from there",
            2 if code == 2 else 1,
        )


def _wait(process: subprocess.Popen, asked: list[int], timeout_s: float | None, what: str) -> int:
    end = None if timeout_s is None else time.monotonic() + timeout_s
    leave = None
    while True:
        try:
            return process.wait(1)
        except subprocess.TimeoutExpired:
            now = time.monotonic()
            leave = leave or (now + STOPPED_TIMEOUT_S if asked else None)
            if now > (end or now) or now > (leave or now):
                raise ActionFailed(
                    f"{what} did not end within {STOPPED_TIMEOUT_S if asked else timeout_s:.0f} s and was killed", 1
                ) from None


def check_redo(plan: Plan, stage: int) -> None:
    """`stage`: counted from 1. Raises InputError."""
    begun = len(Lineage(plan.dir).stages)
    if not 1 <= stage <= begun:
        constraint = f"must be between 1 and {begun}, the stages that were begun" if begun else "no stage was begun yet"
        raise InputError("--redo-from", stage, constraint, "name one of them" if begun else "leave it out")


def forget(plan: Plan, lineage: Lineage, number: int) -> None:
    """Before stages are done again: their run folders and exports are moved aside, never removed. Raises InputError."""
    check_redo(plan, number + 1)
    for record in lineage.stages[number:]:
        for folder in (Path(record["config"]["run_dir"]), plan.dir / f"{record['name']}_hf"):
            if folder.exists():
                aside = next(
                    p
                    for i in range(1, 10_000)
                    if not (p := folder.with_name(f"{folder.name}.before_redo_{i}")).exists()
                )
                folder.rename(aside)
                print(f"{folder} is now {aside}", flush=True)
    lineage.cut(number)


def summary(lineage: Lineage) -> str:
    lines = []
    for record in lineage.stages:
        seen = record["evaluate"]
        score = (
            ", ".join(f"{k.removeprefix('eval/')} {v:.3f}" for k, v in seen.items() if k.startswith("eval/"))
            or seen["skipped"]
        )
        lines.append(
            f"stage {record['name']}: {record['train']['steps']} steps ({record['train']['ended_by']}); step "
            f"{record['choose']['step']} in {record['export']['folder']}; {score}"
        )
        if "minus_stage_before" in seen:
            lines.append(f"    minus the stage before: {seen['minus_stage_before']}")
    return "\n".join(lines)
