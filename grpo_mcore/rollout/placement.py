"""Where engines stand: the Ray that they run in, the GPUs that it may give them, and the room reserved for all of
them."""

import os
import secrets
import tempfile
import threading
import time
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from grpo_mcore.config import config
from grpo_mcore.config.config import InputError

LONGEST_TMPDIR = 107 - len(
    "/00000000-0000-0000-0000-000000000000"
)  # vLLM's sockets; those of multiprocessing are shorter
_apart = False
# Ray's processes in a process group of their own: torchrun and `timeout` signal all of a driver's group, whose SIGTERM
# is a run's to answer, with Ray still there.
os.register_at_fork(after_in_child=lambda: os.setpgrp() if _apart else None)


def check_sockets() -> None:
    """Raises InputError if the temporary folder is too deep for the sockets that engines put into it."""
    if len(os.fsencode(tempfile.gettempdir())) > LONGEST_TMPDIR:
        raise too_long("TMPDIR", tempfile.gettempdir())


def start_ray(cfg: config.Engine, *, cuda: bool, alone: bool) -> None:
    """Or joins the cluster of RAY_ADDRESS. `alone`: there is no trainer. Raises InputError."""
    check_sockets()
    if "RAY_ADDRESS" in os.environ:
        _join(os.environ["RAY_ADDRESS"], cfg.start_timeout_s)
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if cuda:
        num_trainers = 0 if alone else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(engine_gpus(visible, num_trainers, cfg))
    try:
        _start_here(cfg)
    finally:
        if visible is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible
        elif cuda:
            del os.environ["CUDA_VISIBLE_DEVICES"]


def _join(address: str, timeout_s: float) -> None:
    """Raises InputError. Ray asks a head that is gone again and again, in C: a thread waits for it."""
    problems: list[Exception] = []

    def connect() -> None:
        try:
            ray.init(log_to_driver=False)
        except Exception as e:  # Ray has no class for it
            problems.append(e)

    thread = threading.Thread(target=connect, name="joining Ray", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive() or problems:
        why = str(problems[0]).splitlines()[0] if problems else f"it did not answer within {timeout_s:.0f} s"
        raise InputError("RAY_ADDRESS", address, f"cannot be joined: {why}", "see that Ray's head is up, or unset it")


def too_long(name: str, folder: str) -> InputError:
    return InputError(name, folder, "is too long a path for sockets to be in it", f"set {name} to a short one, as /tmp")


def _start_here(cfg: config.Engine) -> None:
    """Ray gives its own start 30 s, which a busy machine may exceed: then it is tried again, within start_timeout_s.
    Raises InputError."""
    global _apart
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else Ray writes one into the home folder
    end = time.monotonic() + cfg.start_timeout_s
    while True:
        try:
            _apart = True
            ray.init(
                "local",  # not another cluster that `ray start` has left on this machine
                num_cpus=cfg.num_engines,
                include_dashboard=False,
                log_to_driver=False,
                _node_ip_address="127.0.0.1",
                object_store_memory=256 << 20,
                configure_logging=True,
                logging_level="error",
            )
            return
        except Exception as e:  # Ray has no class for it
            if "AF_UNIX path length" in str(e):
                name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
                raise too_long(name, os.environ[name]) from None
            if "timed out during startup" not in str(e) or time.monotonic() > end:
                raise
            print("Ray did not start within its 30 s; it is started again", flush=True)
        finally:
            _apart = False


def engine_gpus(visible: str | None, num_trainers: int, cfg: config.Engine) -> list[str]:
    """Which of this machine's GPUs engines may have: the trainers' own, which are the first ones, or those behind them;
    all where there is no trainer. `visible` is CUDA_VISIBLE_DEVICES. Raises InputError."""
    import torch

    gpus = [str(i) for i in range(torch.cuda.device_count())] if visible is None else visible.split(",")
    theirs, where = gpus, ""
    if num_trainers and cfg.is_colocated("cuda"):
        theirs, where = gpus[:num_trainers], f" among the {num_trainers} of the trainers"
    elif num_trainers:
        theirs, where = gpus[num_trainers:], f" beside the {num_trainers} of the trainers"
    if len(theirs) < cfg.num_engines * cfg.tp:
        raise InputError(
            "engine.num_engines",
            cfg.num_engines,
            f"x engine.tp = {cfg.tp} needs {cfg.num_engines * cfg.tp} GPUs{where}, and this machine shows {len(gpus)}",
            "lower it, change the number of trainers or engine.placement, or join a Ray cluster (RAY_ADDRESS)",
        )
    return theirs


def reserve(cfg: config.Engine, *, cuda: bool) -> PlacementGroup:
    """A bundle for each engine, as near to each other as may be; its GPUs are on one machine. Raises InputError."""
    needs: dict[str, float] = {"CPU": 1, **({"GPU": cfg.tp} if cuda else {})}
    have = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(int(min(node.get(name, 0) // n for name, n in needs.items())) for node in have)
    problem = f"the Ray cluster has room for {room}"
    if room >= cfg.num_engines:
        group = placement_group([needs] * cfg.num_engines, strategy="PACK")
        if group.wait(cfg.start_timeout_s):
            return group
        problem = f"others did not leave that much of the Ray cluster within {cfg.start_timeout_s:.0f} s"
    raise InputError(
        "engine.num_engines",
        cfg.num_engines,
        f"needs {needs} each on one machine, and {problem}",
        "lower it or engine.tp, or let more machines join first",
    )


def in_bundle(actor: type, group: PlacementGroup, index: int, environment: dict[str, str]) -> Any:
    """Of `actor` what `remote` makes one of, with all that the bundle has."""
    bundle = group.bundle_specs[index]
    return ray.remote(actor).options(
        num_cpus=bundle["CPU"],
        num_gpus=bundle.get("GPU", 0),
        max_concurrency=1000,
        runtime_env={"env_vars": environment},
        scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
    )
