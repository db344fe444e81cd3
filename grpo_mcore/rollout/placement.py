"""Where engines stand: the Ray that they run in, the GPUs that it may give them, and the room reserved for all of
them."""

import os
import time

import ray
from ray.util.placement_group import PlacementGroup, placement_group

from grpo_mcore.config import config
from grpo_mcore.config.config import InputError


def start_ray(cfg: config.Engine, *, cuda: bool) -> None:
    if "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=False)
        return
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if cuda and cfg.placement == "disaggregated":
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(
            engine_gpus(hidden, int(os.environ.get("LOCAL_WORLD_SIZE", "1")), cfg)
        )
    try:
        _start_here(cfg)
    finally:
        if hidden is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = hidden
        elif cuda:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)


def _start_here(cfg: config.Engine) -> None:
    """Ray gives its own start 30 s, which a busy machine may exceed: then it is tried again, within start_timeout_s."""
    end = time.monotonic() + cfg.start_timeout_s
    while True:
        try:
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
            if "timed out during startup" not in str(e) or time.monotonic() > end:
                raise
            print("Ray did not start within its 30 s; it is started again", flush=True)


def engine_gpus(visible: str | None, num_trainers: int, cfg: config.Engine) -> list[str]:
    """Of this machine's GPUs those behind the trainers', which take the first ones. `visible` is CUDA_VISIBLE_DEVICES.
    Raises InputError."""
    import torch

    gpus = [str(i) for i in range(torch.cuda.device_count())] if visible is None else visible.split(",")
    needed = cfg.num_engines * cfg.tp
    if len(gpus) < num_trainers + needed:
        raise InputError(
            "engine.num_engines",
            cfg.num_engines,
            f"x engine.tp = {cfg.tp} needs {needed} GPUs beside the {num_trainers} of the trainers, and this "
            f"machine shows {len(gpus)}",
            "lower it, start fewer trainers, set engine.placement=colocated, or join a Ray cluster (RAY_ADDRESS)",
        )
    return gpus[num_trainers:]


def reserve(bundles: list[dict[str, float]], timeout_s: float) -> PlacementGroup:
    """Room for all engines, as near to each other as may be; an engine's GPUs are on one machine. Raises InputError."""
    group = placement_group(bundles, strategy="PACK")
    if not group.wait(timeout_s):
        have = {name: n for name, n in ray.cluster_resources().items() if name in ("CPU", "GPU")}
        raise InputError(
            "engine.num_engines",
            len(bundles),
            f"needs {bundles[0]} each on one machine, and the Ray cluster has {have} in all",
            "lower it or engine.tp, or let more machines join",
        )
    return group
