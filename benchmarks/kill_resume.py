"""kill -9 at random moments, the same command again, until the run is finished: its weights are those of an
uninterrupted run.

    python benchmarks/kill_resume.py --kills 20                                          one process
    python benchmarks/kill_resume.py --kills 5 --nproc-per-node 2 parallel.pp=2          any layout, through torchrun

A small real run of launch/train.py (Megatron, vLLM, Ray; the quickstart's tiny model, a checkpoint after every step),
first uninterrupted, then killed. One kill in five comes while the program starts, the others within a few steps of its
going on: in the rollout, the update, the save, whatever runs. Equal means the same digest of the exported weights, and
the same metrics of every step but for the clock's. The seed makes the moments, which the machine's speed then places.
"""

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where only the package is installed

from benchmarks import measure
from grpo_mcore.checkpoint import checkpoint, convert
from grpo_mcore.report import run_folder

OVERRIDES = [
    "eval.data=null",
    "checkpoint.every=1",
    "rollout.prompts_per_step=8",
    "rollout.group_size=4",
    "batch.global_batch_size=16",
    "engine.num_engines=1",
    "data.max_prompt_tokens=8",
    "rollout.timeout_s=120",
]
CLOCKS = ("time/", "tokens_per_s", "refit/seconds", "reward/seconds", "refit/gb_per_s")
START_S, RUN_TIMEOUT_S = 180.0, 1800.0


class Run:
    def __init__(self, folder: Path, steps: int, nproc: int, overrides: list[str]):
        self.folder = folder
        launcher = (
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
            if nproc > 1
            else [sys.executable]
        )
        self.command = [
            *launcher,
            str(measure.ROOT / "launch/train.py"),
            "--cfg",
            str(measure.ROOT / "configs/quickstart.yaml"),
            f"run_dir={folder}",
            f"num_steps={steps}",
            *OVERRIDES,
            *overrides,
        ]

    def start(self) -> subprocess.Popen:
        with (self.folder.parent / f"{self.folder.name}.log").open("a") as log:
            return subprocess.Popen(
                self.command,
                cwd=self.folder.parent,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
            )

    def finish(self) -> None:
        process = self.start()
        try:
            code = process.wait(RUN_TIMEOUT_S)
        finally:
            kill(process)
        if code:
            raise SystemExit(
                f"{self.folder.name} ended with "
                f"{code}:\n{(self.folder.parent / f'{self.folder.name}.log').read_text()[-3000:]}"
            )

    def steps(self) -> int:
        return max((row["step"] for row in run_folder.read_metrics(self.folder)), default=0)

    def killed(self, rng: random.Random) -> dict:
        """Starts it, and kills it at a random moment. What it had reached."""
        before, process, began = self.steps(), self.start(), time.monotonic()
        try:
            if rng.random() < 0.2:
                time.sleep(rng.uniform(0, 15))
            else:
                while self.steps() <= before and process.poll() is None:
                    if time.monotonic() - began > START_S:
                        raise SystemExit(f"no step within {START_S:.0f} s; see {self.folder}.log")
                    time.sleep(0.05)
                time.sleep(rng.uniform(0, 2))
        finally:
            kill(process)
        names = sorted(p.name for p in (self.folder / "checkpoints").glob("*"))
        return {
            "seconds": round(time.monotonic() - began, 1),
            "steps_before": before,
            "steps_reached": self.steps(),
            "newest": names[-1] if names else None,
        }

    def digest(self) -> str:
        """sha256 of the newest checkpoint's weights, exported."""
        with tempfile.TemporaryDirectory() as scratch:
            convert.to_hf(checkpoint.published(self.folder)[0], f"{scratch}/hf")
            return hashlib.sha256(Path(f"{scratch}/hf/model.safetensors").read_bytes()).hexdigest()

    def rows(self) -> list[dict]:
        return [
            {k: v for k, v in row.items() if not k.startswith(CLOCKS)} for row in run_folder.read_metrics(self.folder)
        ]


def kill(process: subprocess.Popen) -> None:
    """-9 to the whole session: the program's processes, its engines and writers."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main() -> None:
    parser = measure.parser(__doc__, "kill_resume.json")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, help="default: 4 for each kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--nproc-per-node", type=int, default=1)
    args = parser.parse_intermixed_args()
    steps, rng, about = args.steps or 4 * args.kills, random.Random(args.seed), measure.about(__doc__)
    with tempfile.TemporaryDirectory() as scratch:
        overrides = [f"model={scratch}/model", *args.overrides]
        whole, killed = (
            Run(Path(scratch) / name, steps, args.nproc_per_node, overrides) for name in ("uninterrupted", "killed")
        )
        whole.finish()
        expected = whole.digest()
        print(f"uninterrupted: {whole.steps()} steps, weights {expected[:16]}", flush=True)
        kills = []
        while len(kills) < args.kills and killed.steps() < steps:
            kills.append(killed.killed(rng))
            print(f"kill {len(kills)}: {kills[-1]}", flush=True)
        killed.finish()
        seen = killed.digest()
        result = about | {
            "steps": steps,
            "kills": kills,
            "digest_uninterrupted": expected,
            "digest_killed": seen,
            "weights_equal": seen == expected,
            "metrics_equal": killed.rows() == whole.rows(),
        }
    measure.write(args.out, result)
    print(
        f"{len(kills)} kills, {steps} steps: weights {'equal' if result['weights_equal'] else 'DIFFER'}, metrics "
        f"{'equal' if result['metrics_equal'] else 'DIFFER'}"
    )
    raise SystemExit(not (result["weights_equal"] and result["metrics_equal"]))


if __name__ == "__main__":
    main()
