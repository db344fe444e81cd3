"""The user's environments and agents, seen from the run: processes that hold many sessions each, and can be killed.

A session belongs to one process, and ends with it: whatever an environment does costs its own response, and where it
takes its process with it those of the sessions in it.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from grpo_mcore.config import config
from grpo_mcore.config.config import InputError
from grpo_mcore.reward.killable import Limits, Pool, StartError

MODULE = "grpo_mcore.environment.environment_process"


class Environments:
    """A context manager; any thread may ask."""

    def __init__(self, cfg: config.Environment):
        """Loads the environment. Raises InputError."""
        limits = Limits(cfg.wall_s, cfg.wall_s, cfg.memory_bytes)
        command = (MODULE, cfg.path, json.dumps([cfg.max_turns, cfg.wall_s, cfg.memory_bytes]))
        self._pools = [
            Pool(command, limits, num_processes=1, remedy="mend what it imports") for _ in range(cfg.num_processes)
        ]
        self._names = itertools.count()
        try:
            says = self._pools[0].says()
        except StartError as e:
            says = {"error": str(e)}
        if "error" in says:
            self.close()
            raise InputError("environment.path", cfg.path, f"cannot be used: {says['error']}", "mend it, or the path")
        self.tools: list[Mapping[str, Any]] = says["tools"]  # schemas, for the chat template

    def __enter__(self) -> "Environments":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        for pool in self._pools:
            pool.close()

    def start(self, messages: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> "tuple[int, Future[Any]]":
        """(the session's name, what it asks for first: a dict, or Stopped)"""
        name = next(self._names)
        return name, self._ask("start", name, [dict(m) for m in messages], dict(row))

    def go_on(self, name: int, reply: Mapping[str, Any]) -> "Future[Any]":
        return self._ask("go on", name, dict(reply))

    def end(self, name: int) -> None:
        """Of a session that nothing more comes of."""
        self._ask("end", name)

    def _ask(self, kind: str, name: int, *more: Any) -> "Future[Any]":
        return self._pools[name % len(self._pools)].ask((kind, name, *more))


def tools_of(cfg: config.Config) -> list[Mapping[str, Any]]:
    """The schemas that the chat template tells the model; none without an environment. Raises InputError."""
    if cfg.environment is None:
        return []
    with Environments(cfg.environment) as environments:
        return environments.tools
