"""What is asked of the Hugging Face hub: within a deadline, and what goes wrong there in one line."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from huggingface_hub.errors import HFValidationError, HTTPError

from grpo_mcore.config.config import InputError

TIMEOUT_S = 3600.0  # to fetch all of one model or data set, or to wait for the process that does

POINTER = b"version https://git-lfs"  # what a clone without Git LFS has in the place of a large file

NOT_THERE = (OSError, HTTPError, HFValidationError)  # what the hub's clients raise of what they cannot reach

Result = TypeVar("Result")


def refuse_pointer(name: str, file: Path) -> None:
    """`name` is the configuration's field. Raises InputError, and OSError if the file cannot be read."""
    with file.open("rb") as f:
        if f.read(len(POINTER)) == POINTER:
            raise InputError(
                name, str(file), "is Git LFS's pointer to a file, and not the file", "run git lfs pull in its folder"
            )


def ask(name: str, value: str, kinds: str, work: Callable[[], Result], *, timeout_s: float = TIMEOUT_S) -> Result:
    """work(), which reads what `value` names from the hub or its cache. For errors: `name` is the configuration's
    field, `kinds` what the value may be. Raises InputError.

    In a thread that the process does not wait for when it ends: a hub that never answers cannot hold it.
    """
    result: Future[Result] = Future()

    def answer() -> None:
        try:
            result.set_result(work())
        except BaseException as e:
            result.set_exception(e)

    threading.Thread(target=answer, daemon=True).start()
    try:
        return result.result(timeout_s)
    except (OSError, ValueError, HTTPError) as e:
        if isinstance(e, TimeoutError) and not result.done():
            raise InputError(
                name,
                value,
                f"did not come from the hub within {timeout_s:.0f} s",
                "look at the network and start again: the files that have come whole are kept",
            ) from None
        why = (str(e).splitlines() or [""])[0]
        raise InputError(
            name,
            value,
            f"is neither {kinds} that can be reached ({type(e).__name__}: {why})",
            "check the name, the network, HF_ENDPOINT and HF_HUB_OFFLINE",
        ) from e
