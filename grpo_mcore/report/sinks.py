"""Where a run's numbers go: seconds by phase (Timer); metrics to JSONL, TensorBoard and the console (Writer)."""

import contextlib
import json
import math
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from grpo_mcore.report import run_folder


class Timer:
    """Seconds by phase within a step, and which phase is running."""

    def __init__(self, on_phase=lambda phase: None):
        self._on_phase = on_phase
        self.seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, phase: str):
        start = time.perf_counter()
        self._on_phase(phase)
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - start

    def drain(self) -> dict[str, float]:
        """The seconds since the last call, and starts anew."""
        out = {f"time/{phase}_s": s for phase, s in self.seconds.items()}
        self.seconds.clear()
        return out


class Writer:
    """Rows of metrics to RUN/metrics.jsonl, RUN/tensorboard and the console. Only the driver makes one.

    Resuming at `start` drops the rows of later steps, which will be made again.
    """

    def __init__(self, run_dir: str | Path, *, start: int, num_steps: int):
        from torch.utils.tensorboard import SummaryWriter

        self.path = Path(run_dir) / "metrics.jsonl"
        kept = [
            row
            for row in run_folder.read_metrics(run_dir)
            if row["step"] < start or (row["step"] == start and not run_folder.is_evaluation(row))
        ]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self._board = SummaryWriter(str(Path(run_dir) / "tensorboard"), purge_step=start + 1)
        self._start, self._num_steps, self._began = start, num_steps, time.monotonic()
        self._live = sys.stderr.isatty()

    def phase(self, name: str) -> None:
        """Shows the running phase where the console can overwrite a line."""
        if self._live:
            print(f"\r\033[K{name} ...", end="", file=sys.stderr, flush=True)

    def write(self, step: int, row: dict[str, float]) -> None:
        """One row: to be called once per step, and once per evaluation. A NaN in it is said: it can be neither best
        nor a gain."""
        with self.path.open("a") as f:
            f.write(json.dumps({"step": step, **row}) + "\n")
        for name, value in row.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()
        if nan := [name for name, value in row.items() if math.isnan(value)]:
            self.say(f"warning: after {step} steps NaN is the value of {', '.join(nan)}")

    def write_rollouts(self, step: int, rows: Iterable[dict]) -> None:
        """RUN/rollouts/step_000001.jsonl: what was sampled for the step."""
        path = self.path.parent / "rollouts" / f"step_{step:06d}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def show(self, step: int, row: dict[str, float]) -> None:
        done = step - self._start
        left_s = (time.monotonic() - self._began) / max(done, 1) * (self._num_steps - step)
        phases = " ".join(
            f"{k.removeprefix('time/').removesuffix('_s')} {v:.2f}s"
            for k, v in row.items()
            if k.startswith("time/") and k != "time/step_s"
        )
        self.say(
            f"step {step}/{self._num_steps} | reward {row['reward/mean']:.3f} | {row['tokens_per_s']:.0f} tokens/s "
            f"| {phases} | left {left_s / 60:.1f} min"
        )

    def say(self, text: str) -> None:
        if self._live:
            print("\r\033[K", end="", file=sys.stderr)
        print(text[: shutil.get_terminal_size((200, 24)).columns] if self._live else text, flush=True)

    def close(self) -> None:
        self._board.close()
