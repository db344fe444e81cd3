"""A run's folder belongs to one process at a time, and from its first checkpoint on to one run.

RUN/lock is held by the driver as long as it lives, and names it; the system lets go of it however the driver ends, so
that none is ever stale. RUN/identity.json says what the run was made of, beside config.yaml, which says how.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import yaml

from grpo_mcore.config import config, file as config_file
from grpo_mcore.config.config import InputError
from grpo_mcore.report import run_folder
from grpo_mcore.report.provenance import command

LOCK, IDENTITY = "lock", "identity.json"
# The cursor of a checkpoint counts prompts in an order that these make, in groups of that size.
FIXED = ("seed", "data.shuffle_seed", "data.skip_prompts", "rollout.group_size")
LEAVING_S = 10.0  # for the last processes of a driver that was killed, which hold its lock a moment longer
SAMPLE_BYTES = 1 << 20


@contextlib.contextmanager
def claimed(run_dir: str | Path, *, leaving_s: float = LEAVING_S) -> Iterator[None]:
    """Holds the folder, which is made if need be. Raises InputError naming the process that holds it, and if it cannot
    be written."""
    path = Path(run_dir) / LOCK
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as e:
        raise InputError("run_dir", str(run_dir), f"cannot be written ({e.strerror})", "name another folder") from e
    try:
        _take(lock, path, leaving_s)
        owner = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%F %T"),
            "command": command(),
        }
        os.pwrite(lock, json.dumps(owner).encode(), 0)
        yield
        os.ftruncate(lock, 0)
    finally:
        os.close(lock)


def look(run_dir: str | Path) -> None:
    """Whether `claimed` could have the folder, which stays as it is. Raises InputError."""
    folder = Path(run_dir).absolute()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError("run_dir", str(run_dir), f"cannot be written ({there} is not to be)", "name another folder")
    if (folder / LOCK).is_file():
        lock = os.open(folder / LOCK, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _held(folder / LOCK) from None
        except OSError:  # a file system without locks
            pass
        finally:
            os.close(lock)


def _take(lock: int, path: Path, leaving_s: float) -> None:
    end = time.monotonic() + leaving_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(lock, 0)
            return
        except BlockingIOError:
            if time.monotonic() > end:
                raise _held(path) from None
        except OSError as e:  # a file system without locks
            print(f"{path} cannot be locked ({e.strerror}): start no second run there", flush=True)
            return
        time.sleep(0.1)


def _held(path: Path) -> InputError:
    try:
        owner = json.loads(path.read_text())
        who = f"process {owner['pid']} on {owner['host']} since {owner['since']} ({owner['command']})"
    except (OSError, ValueError):
        who = "another process"
    return InputError(
        "run_dir", str(path.parent), f"is in use by {who}", "wait for it or end it, or name another run_dir"
    )


def folder_digest(folder: str | Path) -> str:
    """Of a model's folder: its config and its weights."""
    return digest(sorted(Path(folder).glob("*.safetensors")), (Path(folder) / "config.json").read_bytes())


def digest(paths: Iterable[Path], head: bytes = b"") -> str:
    """Of large files, by name, size and samples of what they hold."""
    sha = hashlib.sha256(head)
    for path in paths:
        size = path.stat().st_size
        sha.update(f"{path.name} {size}".encode())
        with path.open("rb") as f:
            for start in (0, size // 2, max(size - SAMPLE_BYTES, 0)):
                f.seek(start)
                sha.update(f.read(SAMPLE_BYTES))
    return sha.hexdigest()[:16]


def changes(cfg: config.Config, step: int, contents: Mapping[str, str]) -> list[str]:
    """What is another than at the last start of the run in cfg.run_dir, which has reached `step`: a line for each key.

    `contents` are digests of what keys name. Raises InputError for what a run cannot change: its number of steps to
    fewer than it has done, and what its checkpoint depends on.
    """
    if not step:
        return []
    before, now = _flat(run_folder.read_config(cfg.run_dir)), _flat(yaml.safe_load(config_file.to_yaml(cfg)))
    recorded = run_folder.read_identity(cfg.run_dir)
    begun = f"the run in {cfg.run_dir} reached step {step}"
    if cfg.num_steps < step:
        raise InputError("num_steps", cfg.num_steps, f"must be at least {step}: {begun}", "raise it")
    for key in FIXED:
        if key in before and before[key] != now[key]:
            raise InputError(
                key, now[key], f"was {before[key]} when {begun}", f"set it to {before[key]}, or name another run_dir"
            )
    changed = {key: before[key] for key in now if key in before and before[key] != now[key]}
    for key, digest in contents.items():
        if recorded.get(key, digest) != digest:
            # Of the data set also by its template, of which other tokens come.
            by = next((k for k in changed if k.split(".")[0] == key.split(".")[0]), key)
            what = f"was {changed[by]!r}" if by in changed else "held something else"
            raise InputError(by, now[by], f"{what} when {begun}", "put it back, or name another run_dir")
    return [f"{key} = {now[key]} (was {then})" for key, then in changed.items()]


def record(cfg: config.Config, contents: Mapping[str, str]) -> None:
    """Writes config.yaml and identity.json."""
    (Path(cfg.run_dir) / "config.yaml").write_text(config_file.to_yaml(cfg))
    (Path(cfg.run_dir) / IDENTITY).write_text(json.dumps(dict(contents), indent=1) + "\n")


def _flat(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Values by dotted key."""
    out: dict[str, object] = {}
    for name, value in tree.items():
        out |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return out
