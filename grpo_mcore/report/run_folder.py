"""What a run leaves in its folder, read back: metrics.jsonl, config.yaml, identity.json, provenance.jsonl,
summary.json, rollouts/, the checkpoints' layout.

A run may still be going: a half-written last line is dropped, and what is missing is empty. What is damaged is an
InputError.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import yaml

from grpo_mcore.config.config import InputError


def read_metrics(run_dir: str | Path) -> list[dict]:
    """All rows, in order; each has a whole number "step" and numbers (NaN among them)."""
    path = Path(run_dir) / "metrics.jsonl"
    rows = _read_lines(path)
    for row in rows:
        wrong = [name for name, value in row.items() if not isinstance(value, (int, float)) or isinstance(value, bool)]
        if wrong or not isinstance(row.get("step"), int):
            raise InputError(
                "metrics",
                str(path),
                f"a row's {wrong[0] if wrong else 'step'} is no number: {str(row)[:80]}",
                "mend that line, or remove it",
            )
    return rows


def numbers(rows: Sequence[dict], metric: str) -> list[float]:
    """The values of a metric in the rows that have it; a NaN is none, be it for better or for worse."""
    return [row[metric] for row in rows if not math.isnan(row.get(metric, math.nan))]


def is_evaluation(row: dict) -> bool:
    """Whether a row of metrics.jsonl is an evaluation's, and not a step's."""
    return any(name.startswith("eval/") for name in row)


def read_rollouts(path: Path) -> list[dict]:
    """One of each response of a step: see samples.rollout_rows."""
    return _read_lines(path)


def rollout_files(run_dir: str | Path) -> dict[int, Path]:
    """By step, ascending."""
    return {
        int(path.stem.removeprefix("step_")): path
        for path in sorted(Path(run_dir).glob("rollouts/step_*.jsonl"))
        if path.stem.removeprefix("step_").isdecimal()
    }


def read_config(run_dir: str | Path) -> dict:
    """The keys as written: a run of another version may have others than config.Config."""
    path = Path(run_dir) / "config.yaml"
    try:
        tree = yaml.safe_load(path.read_text(errors="replace")) if path.is_file() else {}
    except yaml.YAMLError as e:
        raise InputError(
            "config", str(path), "is not valid YAML", "mend it, or start the run again, which writes it"
        ) from e
    return tree if isinstance(tree, dict) else {}


def read_provenance(run_dir: str | Path) -> list[dict]:
    """What the run ran with (provenance.provenance), once for each start."""
    return _read_lines(Path(run_dir) / "provenance.jsonl")


def read_summary(run_dir: str | Path) -> dict:
    """Of a finished run; else empty."""
    return _read_object(Path(run_dir) / "summary.json")


def read_identity(run_dir: str | Path) -> dict:
    """Digests of what the run was made of (claim.py), by key; empty for a run of an older version."""
    return _read_object(Path(run_dir) / "identity.json")


def read_layout(run_dir: str | Path) -> dict:
    """Of the ranks that wrote the newest checkpoint: sizes by axis; empty if there is none."""
    files = sorted(Path(run_dir).glob("checkpoints/step_*/run.json"))
    layout = _read_object(files[-1]).get("layout") if files else None
    return layout if isinstance(layout, dict) else {}


def _read_object(path: Path) -> dict:
    try:
        tree = json.loads(path.read_text(errors="replace")) if path.is_file() else {}
    except ValueError as e:
        raise InputError(path.stem, str(path), "is not valid JSON", "remove it") from e
    return tree if isinstance(tree, dict) else {}


def _read_lines(path: Path) -> list[dict]:
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    rows = []
    for number, line in enumerate(lines, 1):
        if line:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as e:
                raise InputError("line", f"{path}:{number}", "is not valid JSON", "mend that line, or remove it") from e
            if not isinstance(row, dict):
                raise InputError("line", f"{path}:{number}", "holds no JSON object", "mend that line, or remove it")
            rows.append(row)
    return rows
