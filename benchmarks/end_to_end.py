"""Steps of whole recipes, by phase, and tokens/s; beside TRL's GRPOTrainer on the same machine, model and batch.

    python benchmarks/end_to_end.py                                          both CPU recipes, ours alone
    pip install -e ".[peers]" && python benchmarks/end_to_end.py --peer trl  ours, then TRL, recipe by recipe
    python benchmarks/end_to_end.py --ahead 1                                ours, in turns and a step ahead

Ours is launch/train.py as a user runs it, without evaluation and checkpoints; trl_peer.py says what TRL shares with it.
Each is a process of its own, one after the other, watched from outside. Figures are medians over the steps after the
warm-up; a step lasts from one row of metrics to the next.

    step            seconds by the clock: all phases and what lies between them
    refit ...       seconds, as the program itself timed its phases; TRL's update includes its old log-probs
    response tok/s  sampled tokens of a step / its seconds
    packed tok/s    the same with the prompts of all responses: the tokens that are trained on
    CPU s           processor seconds of a step, of all processes: Ray, the engines and the grader included

--ahead N compares rollout.max_staleness 0 and N, the trainer bound to one core and the engine to another, a thread
each. What sampling ahead can gain at best is the longer of the two sides for the sum of both: step / max(rollout,
rest), both of the run in turns.

A machine with other work spoils the clock, and less so the processor seconds: see the load averages that are recorded.
Threads: ours as the recipe says (num_threads, engine.num_threads); TRL, which is one process, as --peer-threads says.
"""

import argparse
import contextlib
import importlib.util
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where only the package is installed

from benchmarks import measure
from grpo_mcore.config import file as config_file
from grpo_mcore.report import run_folder

COLUMNS = {
    "step_s": "step",
    **{f"{p}_s": p for p in ("refit", "rollout", "reward", "logprob", "update")},
    "response_tokens_per_s": "response tok/s",
    "packed_tokens_per_s": "packed tok/s",
    "cpu_s": "CPU s",
}
RATIOS = ("response_tokens_per_s", "packed_tokens_per_s", "response_tokens_per_cpu_s", "steps_per_s")
POLL_S, STOP_S = 0.01, 30.0


class ProcessTree:
    """A process and all that it has started."""

    def __init__(self, root: int):
        self._members = {root}

    def cpu_s_of(self) -> dict[int, float]:
        """Processor seconds so far by process id; what has ended counts as its parent's."""
        parent_of, cpu_s = {}, {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it has ended since
                fields, pid = stat.read_text().rpartition(")")[2].split(), int(stat.parent.name)
                parent_of[pid], cpu_s[pid] = int(fields[1]), sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
        self._members &= parent_of.keys()  # whoever was seen once stays, also if another process adopts it
        while new := {pid for pid, parent in parent_of.items() if parent in self._members} - self._members:
            self._members |= new
        return {pid: cpu_s[pid] for pid in self._members}

    def kill(self) -> None:
        for pid in self.cpu_s_of():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@dataclass(frozen=True)
class Step:
    row: dict[str, float]  # of metrics.jsonl
    clock_s: float  # when it came
    cpu_s: float  # processor seconds of the run until then


def watch(command: list[str], run_dir: Path, *, env: dict[str, str], timeout_s: float) -> list[Step]:
    """Runs `command`, which writes run_dir/metrics.jsonl. Exits with the end of its output if it fails or takes too
    long."""
    run_dir.mkdir()
    rows, output, steps, size = run_dir / "metrics.jsonl", run_dir / "output.txt", [], 0
    with output.open("w") as out:
        process = subprocess.Popen(
            command,
            cwd=measure.ROOT,
            env=os.environ | env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    tree, deadline = ProcessTree(process.pid), time.monotonic() + timeout_s
    try:
        while process.poll() is None and time.monotonic() < deadline:
            if rows.is_file() and rows.stat().st_size != size:
                clock_s, cpu_s, size = time.perf_counter(), sum(tree.cpu_s_of().values()), rows.stat().st_size
                steps += [Step(row, clock_s, cpu_s) for row in run_folder.read_metrics(run_dir)[len(steps) :]]
            time.sleep(POLL_S)
    finally:
        ended = process.poll() is not None
        try:
            if not ended:
                tree.cpu_s_of()  # whom to kill if they outlive their parent
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_S)
        finally:  # a second Ctrl-C ends the waiting
            tree.kill()
    if not ended or process.returncode:
        print(*output.read_text(errors="replace").splitlines()[-20:], sep="\n", file=sys.stderr)
        why = f"ended with status {process.returncode}" if ended else f"did not end within {timeout_s:.0f} s"
        sys.exit(f"error: {shlex.join(command[1:])} {why}; the end of its output is above")
    return steps


def figures(before: Step, step: Step, responses_per_step: int) -> dict[str, float]:
    """Of one step: seconds by clock, phase and processor; tokens; and their rates."""
    phases = {name.removeprefix("time/"): s for name, s in step.row.items() if name.startswith("time/")}
    step_s, cpu_s = step.clock_s - before.clock_s, step.cpu_s - before.cpu_s
    response_tokens = step.row["rollout/response_tokens_mean"] * responses_per_step
    counted_s = sum(s for name, s in phases.items() if name not in ("eval_s", "checkpoint_s"))  # as the trainer's rate
    packed_tokens = step.row["tokens_per_s"] * counted_s
    return {
        "step_s": step_s,
        "steps_per_s": 1 / step_s,
        **phases,
        "cpu_s": cpu_s,
        "response_tokens": response_tokens,
        "response_tokens_per_s": response_tokens / step_s,
        "response_tokens_per_cpu_s": response_tokens / cpu_s,
        "packed_tokens": packed_tokens,
        "packed_tokens_per_s": packed_tokens / step_s,
        "reward_mean": step.row["reward/mean"],
    }


def run(
    program: str,
    recipe: str,
    args: argparse.Namespace,
    env: dict[str, str],
    scratch: str,
    *,
    name: str = "",
    more: Sequence[str] = (),
    prefix: Sequence[str] = (),
) -> dict:
    """One program on one recipe, with `more` overrides: the medians of its figures, and how they came about."""
    overrides = ["eval.data=null", "checkpoint.every=0", f"num_steps={args.warmup + args.steps}", *more]
    cfg = config_file.load(measure.ROOT / recipe, overrides)
    run_dir, load = Path(scratch) / f"{Path(recipe).stem}_{name or Path(program).stem}", os.getloadavg()[0]
    print(f"{program} --cfg {recipe}: {cfg.num_steps} steps ...", file=sys.stderr, flush=True)
    steps = watch(
        [*prefix, sys.executable, program, "--cfg", recipe, f"run_dir={run_dir}", *overrides],
        run_dir,
        env=env,
        timeout_s=args.timeout_s,
    )
    if len(steps) != cfg.num_steps:
        sys.exit(f"error: {program} wrote {len(steps)} rows of metrics for {cfg.num_steps} steps")
    samples = [figures(b, s, cfg.responses_per_step) for b, s in pairwise(steps[args.warmup - 1 :])]
    return {
        "program": program,
        "overrides": overrides,
        "environment": env,
        "load_average_before": load,
        "num_steps": len(samples),
        **{name: round(statistics.median(s[name] for s in samples), 4) for name in samples[0]},
    }


def compare(recipe: str, args: argparse.Namespace, scratch: str) -> dict:
    """Ours and the peer, if one is asked for, on one recipe; prints their table."""
    cfg = config_file.load(measure.ROOT / recipe)
    of = {"grpo_mcore": run("launch/train.py", recipe, args, {}, scratch)}
    if args.peer:
        of[args.peer] = run(
            f"benchmarks/{args.peer}_peer.py", recipe, args, {"OMP_NUM_THREADS": str(args.peer_threads)}, scratch
        )
    batch = (
        f"{cfg.precision.params}, {cfg.rollout.prompts_per_step} prompts x {cfg.rollout.group_size} responses of up to "
        f"{cfg.rollout.max_response_tokens} tokens, optimizer steps a step: {cfg.optimizer_steps_per_step}"
    )
    threads = f"ours {cfg.num_threads}, engines {cfg.engine.num_engines} x {cfg.engine.num_threads}" + (
        f", {args.peer} {args.peer_threads}" if args.peer else ""
    )
    print(f"\n{recipe}: {batch}\nthreads: {threads}")
    print(f"{'':10}", *(f"{title:>{max(len(title), 7)}}" for title in COLUMNS.values()), sep="  ")
    for name, f in of.items():
        print(
            f"{name:10}",
            *(f"{f'{f[key]:.2f}' if key in f else '-':>{max(len(title), 7)}}" for key, title in COLUMNS.items()),
            sep="  ",
        )
    out = {"recipe": recipe, "batch": batch, "threads": threads, **of}
    if args.peer:
        out["ours_over_peer"] = {name: round(of["grpo_mcore"][name] / of[args.peer][name], 3) for name in RATIOS}
        print(
            f"ours / {args.peer}: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in out["ours_over_peer"].items()),
            flush=True,
        )
    return out


def compare_ahead(recipe: str, args: argparse.Namespace, scratch: str) -> dict:
    """Ours in turns and with sampling ahead, each side on a core of its own; prints their table."""
    trainer_core, engine_core = sorted(os.sched_getaffinity(0))[:2]
    bound = ["num_threads=1", "engine.num_engines=1", "engine.num_threads=1", f"engine.cores=[{engine_core}]"]
    of = {
        staleness: run(
            "launch/train.py",
            recipe,
            args,
            {},
            scratch,
            name=f"staleness_{staleness}",
            more=[*bound, f"rollout.max_staleness={staleness}"],
            prefix=["taskset", "-c", str(trainer_core)],
        )
        for staleness in (0, args.ahead)
    }
    turns, ahead = of[0], of[args.ahead]
    sides = {"rollout_s": turns["rollout_s"], "rest_s": round(turns["step_s"] - turns["rollout_s"], 4)}
    out = {
        "recipe": recipe,
        "in_turns": turns,
        f"staleness_{args.ahead}": ahead,
        "sides_in_turns": sides,
        "step_over_longer_side": round(ahead["step_s"] / max(sides.values()), 3),
        "target": "at most 1.15",
        "step_over_step_in_turns": round(ahead["step_s"] / turns["step_s"], 3),
    }
    print(
        f"\n{recipe}, trainer on core {trainer_core}, engine on core {engine_core}: a step takes "
        f"{turns['step_s']:.2f} s in turns (rollout {sides['rollout_s']:.2f} s, the rest {sides['rest_s']:.2f} s), "
        f"{ahead['step_s']:.2f} s with sampling {args.ahead} ahead: {out['step_over_longer_side']:.3f} x the "
        f"longer side (target: {out['target']})",
        flush=True,
    )
    return out


def main() -> None:
    parser = measure.parser(__doc__, "end_to_end.json", overrides=None)
    parser.add_argument(
        "--recipes",
        nargs="+",
        default=["configs/quickstart.yaml", "configs/smollm2.yaml"],
        help="paths from the repository's root",
    )
    parser.add_argument("--steps", type=int, default=8, help="steps that count (8)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them, at least 1 (2)")
    parser.add_argument("--peer", choices=["trl"])
    parser.add_argument("--ahead", type=int, metavar="N", help="compare rollout.max_staleness 0 and N instead")
    parser.add_argument("--peer-threads", type=int, default=len(os.sched_getaffinity(0)), help="(all cores)")
    parser.add_argument("--timeout-s", type=float, default=1800.0, help="of one program on one recipe (1800)")
    args = parser.parse_args()
    if args.warmup < 1 or args.steps < 1:
        parser.error("--steps and --warmup must be 1 or more")
    if args.peer and importlib.util.find_spec(args.peer) is None:
        sys.exit(f'error: --peer {args.peer}: it is not installed. Remedy: pip install -e ".[peers]"')
    about = measure.about(__doc__, "trl")
    with tempfile.TemporaryDirectory() as scratch:
        results = [(compare_ahead if args.ahead else compare)(recipe, args, scratch) for recipe in args.recipes]
    measure.write(args.out, {**about, "results": results})
    print(f"\nwritten to {args.out}")


if __name__ == "__main__":
    main()
