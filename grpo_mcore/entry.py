"""What every program of launch/ does alike: read the command line, and end cleanly whatever happens."""

import time

BEGAN = time.monotonic()  # imported first: the wall clock of a run includes the imports

import argparse  # noqa: E402
import ctypes  # noqa: E402
import errno  # noqa: E402
import os  # noqa: E402
import re  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import traceback  # noqa: E402
import warnings  # noqa: E402
from collections.abc import Callable, Mapping, Sequence  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any, TypeVar  # noqa: E402

from grpo_mcore.config import config, file as config_file  # noqa: E402

# Before torch is imported: threads that spin while they wait slow every other process of a small machine, up to 8 x.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


Result = TypeVar("Result")


@dataclass(frozen=True)
class Command:
    config: config.Config
    dry_run: bool
    options: dict[str, Any]  # the program's own, by their names in Python; None: not given


def number(option: str, given: str | float, low: float = 0.0, high: float = float("inf")) -> float:
    """Raises InputError."""
    try:
        value = float(given)
    except ValueError:
        value = float("nan")
    if not low <= value <= high or value == float("inf"):
        bounds = f"of {low:g} or more" if high == float("inf") else f"from {low:g} to {high:g}"
        raise config.InputError(option, given, f"must be a number {bounds}", "give one")
    return value


def whole_number(option: str, given: str | None, low: int = 0, high: int = 1_000_000) -> int:
    """Raises InputError."""
    value = int(given) if given and re.fullmatch("[0-9]{1,15}", given) else -1
    if not low <= value <= high:
        raise config.InputError(option, given, f"must be a whole number from {low} to {high}", "give one")
    return value


def whole_numbers(option: str, given: str) -> tuple[int, ...]:
    """Raises InputError."""
    return tuple(whole_number(option, n) for n in given.split(","))


def out_file(option: str, given: str) -> Path:
    """A file to be written after the work, which it may not cost: its folder is made, and that it can be written is
    tried. Raises InputError."""
    path = Path(given)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        path.open("a").close()
        if is_new:
            path.unlink()
    except OSError as e:
        raise config.InputError(option, given, f"cannot be written ({e.strerror})", "name another file") from e
    return path


def hide_gpus() -> None:
    """For work on a CPU, before torch is imported: Megatron takes a GPU that torch sees, whatever it is told."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def parse(
    description: str, *options: str, flags: Sequence[str] = (), types: Mapping[str, Callable[[str, str], object]] = {}
) -> Command:
    """--cfg FILE [--dry-run] [options ...] [key.sub=value ...] of sys.argv; a flag is an option without a value.
    `types`: more options, each with what makes its value of (option, text), such as `number`. A configuration for a
    CPU hides the GPUs. Raises InputError."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--cfg", required=True, help="YAML file, such as configs/quickstart.yaml")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration with its derived sizes, and exit"
    )
    for option in options:
        parser.add_argument(option)
    for option, type_ in types.items():
        parser.add_argument(option, type=partial(type_, option))
    for flag in flags:
        parser.add_argument(flag, action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    given = vars(parser.parse_intermixed_args())
    loaded = config_file.load(given.pop("cfg"), given.pop("overrides"))
    if loaded.device == "cpu":
        hide_gpus()
    return Command(loaded, given.pop("dry_run"), given)


def stop_on_sigterm() -> None:
    """SIGTERM as Ctrl-C. To be called again after ray.init, which puts a handler of its own in place."""
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))


class Preempted(BaseException):
    """SIGTERM came. Carries what to tell the user."""


MAKE_ROOM = "make room, and run the same command: a run goes on from its last checkpoint"
MAY_NOT = "mend the rights, or name another place"
# What a disk may refuse at any moment of the work: errno -> what to do.
CANNOT_WRITE = {
    errno.ENOSPC: MAKE_ROOM,
    errno.EDQUOT: MAKE_ROOM,
    errno.EFBIG: MAKE_ROOM,
    errno.EROFS: MAY_NOT,
    errno.EACCES: MAY_NOT,
    errno.EPERM: MAY_NOT,
}


class DoesNotFit(config.RunError):
    """A run needs more memory than its machines have. Carries what to tell the user."""


class Preemption:
    """SIGTERM while training: the run saves and leaves at the next place where it is whole.

    Only the driver listens, and tells the others (torchrun and SLURM signal every rank, at slightly different times).
    """

    def __init__(self):
        self.asked = False
        self._may_interrupt = False

    def listen(self, driver: bool) -> None:
        signal.signal(signal.SIGTERM, self._on_signal if driver else signal.SIG_IGN)

    def _on_signal(self, *_) -> None:
        self.asked = True
        if self._may_interrupt:
            raise Preempted

    def unless_asked(self, work: Callable[[], Result]) -> Result | None:
        """work(), which can be given up and done again: None, at once, when SIGTERM comes, or has come."""
        try:
            self._may_interrupt = True
            result = None if self.asked else work()
            self._may_interrupt = False
            return result
        except Preempted:
            return None
        finally:
            self._may_interrupt = False


def die_with_parent(how: int = signal.SIGKILL) -> None:
    """Has Linux send this process a signal when the one that started it ends, however it ends."""
    ctypes.CDLL(None).prctl(1, how)  # 1: PR_SET_PDEATHSIG


def run(main: Callable[[], None]) -> None:
    """Runs main and exits: 0; 2 for bad input, in one line; 130 when stopped; 143 when SIGTERM made it save and leave;
    1 for any other error, with its traceback.

    Before training begins SIGTERM stops the driver as Ctrl-C does. The other ranks own nothing that must be closed:
    they just end.
    """
    # Megatron warns of every missing CUDA extension, one by one.
    warnings.filterwarnings("ignore", module=r"megatron\..*")
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # names that Megatron uses
    os.register_at_fork(after_in_child=die_with_parent)  # Megatron's checkpoint writers wait for a dead parent for ever
    driver = os.environ.get("RANK", "0") == "0"
    if driver:
        stop_on_sigterm()
    try:
        main()
    except config.InputError as e:
        if not driver:
            # The driver finds the same, and torchrun then ends this rank; if not, it is this rank's to say.
            time.sleep(60)
        print(f"error: {e}", file=sys.stderr, flush=True)
        code = 2
    except KeyboardInterrupt:
        if driver:
            print("\nstopped; the same command goes on from the last checkpoint", file=sys.stderr, flush=True)
        code = 130
    except Preempted as e:
        if driver:
            print(e, file=sys.stderr, flush=True)
        code = 143
    except (config.RunError, FloatingPointError) as e:
        print(f"error: {e}", file=sys.stderr, flush=True)
        code = 1
    except Exception as e:
        if isinstance(e, OSError) and e.errno in CANNOT_WRITE:
            where = e.filename or "what this program writes"
            print(f"error: {where}: {e.strerror}. Remedy: {CANNOT_WRITE[e.errno]}", file=sys.stderr, flush=True)
        else:
            traceback.print_exc()
        code = 1
    else:
        code = 0
    sys.stdout.flush()
    if code:
        os._exit(code)  # skips the interpreter's teardown: gloo's threads may wait for a rank that has failed
