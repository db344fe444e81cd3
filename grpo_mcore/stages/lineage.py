"""DIR/lineage.json: what has become of each stage, written after every action, so that the next one is known whenever
it stopped.

    {"stages": [{"name": "8k", "status": "finished", "spec": {...}, "config": {...}, "config_digest": "...", "versions":
    {...}, "commit": "...",
                 "carry_over": {...}, "train": {...}, "choose": {...}, "export": {...}, "prove": {...}, "evaluate":
                 {...}}, ...]}

An action that has its entry is finished. What it was told is compared with what it would be told now: a difference is
an error that names the field.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path

from grpo_mcore.config.config import Config, InputError
from grpo_mcore.report.provenance import commit, versions
from grpo_mcore.stages.stages import Stage

FILE = "lineage.json"
ACTIONS = ("train", "choose", "export", "prove", "evaluate")
# Key of a stage -> the action that it steers, after which it may not change.
STEERS = {"prompts": "train", "optimizer": "train", "choose": "choose", "evaluate": "evaluate"}


class Lineage:
    """The records of DIR/lineage.json, in the order of the stages."""

    def __init__(self, folder: str | Path):
        self._path = Path(folder) / FILE
        try:
            self.stages: list[dict] = json.loads(self._path.read_text())["stages"] if self._path.is_file() else []
        except (ValueError, KeyError, TypeError) as e:
            raise InputError(
                "dir", str(folder), f"its {FILE} is damaged ({e})", "restore it, or name another dir"
            ) from e

    def begin(self, name: str, spec: dict, config: Config, carry_over: dict) -> dict:
        """The record of the stage that is to be trained, made or brought up to date."""
        if not self.stages or self.stages[-1]["name"] != name:
            self.stages.append({"name": name})
        record = self.stages[-1]
        record |= {
            "status": "train",
            "spec": spec,
            "config": plain(config),
            "config_digest": config_digest(config),
            "versions": versions(),
            "commit": commit(),
            "carry_over": carry_over,
        }
        self.write()
        return record

    def finish(self, record: dict, action: str, result: dict) -> None:
        record[action] = result
        record["status"] = next_action(record) or "finished"
        self.write()

    def cut(self, number: int) -> None:
        """Forgets the stages from `number` on."""
        self.stages = self.stages[:number]
        self.write()

    def write(self) -> None:
        """Atomically."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".partial")
        with partial.open("w") as f:
            f.write(json.dumps({"stages": self.stages}, indent=1) + "\n")
            f.flush()
            os.fsync(f.fileno())
        partial.replace(self._path)


def next_action(record: dict) -> str | None:
    """The first that is not finished."""
    return next((action for action in ACTIONS if action not in record), None)


def check_unchanged(record: dict, number: int, spec: dict, config: Config) -> None:
    """Raises InputError naming the first field in which a stage that was trained, or what steered its later actions,
    differs from now."""
    remedy = f"put it back, or do that stage and those after it again with --redo-from {number + 1}"
    if record["name"] != spec["name"]:
        raise InputError(f"stages[{number}].name", spec["name"], f"was {record['name']!r} in the lineage", remedy)
    for key, action in STEERS.items():
        if action in record and record["spec"].get(key, spec[key]) != spec[key]:
            raise InputError(
                f"stages[{number}].{key}",
                spec[key],
                f"was {record['spec'][key]!r} when stage {record['name']} was done",
                remedy,
            )
    if "train" in record:
        for dotted, before, now in differences(record["config"], plain(config)):
            raise InputError(
                f"stage {record['name']}: {dotted}", now, f"was {before!r} when the stage was trained", remedy
            )


def differences(before: dict, now: dict, prefix: str = "") -> list[tuple[str, object, object]]:
    """(dotted key, before, now) of every value that differs. A key that only one version of the code knows is none."""
    out: list[tuple[str, object, object]] = []
    for key in before.keys() & now.keys():
        a, b = before[key], now[key]
        if isinstance(a, dict) and isinstance(b, dict):
            out += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            out.append((prefix + key, a, b))
    return sorted(out, key=lambda one: one[0])


def plain(value: Config | Stage) -> dict:
    """As JSON gives it back."""
    return json.loads(json.dumps(dataclasses.asdict(value)))


def config_digest(config: Config) -> str:
    return hashlib.sha256(json.dumps(plain(config), sort_keys=True).encode()).hexdigest()[:16]
