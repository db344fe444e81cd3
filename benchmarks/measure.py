"""What the benchmarks share: seconds, peak memory, the peak of matrix products, command lines, a result's file.

Needs torch alone beside the package's own files, so that kernels.py runs where nothing else is installed.
"""

import argparse
import ctypes
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from grpo_mcore.report.provenance import provenance

ROOT = Path(__file__).resolve().parents[1]
MODELS, RESULTS = ROOT / "configs/benchmarks", ROOT / "benchmarks/results"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """By the clock, the device idle before and after."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def matrix_flops_per_s(dtype: torch.dtype, device: torch.device, wait: Callable[[], None] = lambda: None) -> float:
    """The fastest of many products of two square matrices. `wait`: called before each timing, for other ranks."""
    if device.type == "cuda":
        n, products = 8192, 20
    else:  # without AVX-512 torch multiplies bfloat16 a hundred times slower than float32
        n, products = 2048 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 512, 1
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))

    def timing() -> float:
        wait()
        return seconds(lambda: [a @ b for _ in range(products)], device)

    return products * 2 * n**3 / min(timing() for _ in range(12))


def give_back(device: torch.device) -> None:
    """What the allocator holds and nobody uses."""
    torch.cuda.empty_cache() if device.type == "cuda" else ctypes.CDLL(None).malloc_trim(0)


def held_bytes(device: torch.device) -> int:
    """CUDA: allocated by torch. CPU: resident, of this process."""
    return torch.cuda.memory_allocated() if device.type == "cuda" else _status_bytes("VmRSS")


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        give_back(device)
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM


def peak_bytes(device: torch.device) -> int:
    """The most of `held_bytes` since `reset_peak`."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _status_bytes("VmHWM")


def _status_bytes(key: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) << 10


def parser(doc: str, result: str | None = None, *, overrides: str | None = "") -> argparse.ArgumentParser:
    """`result`: the file below benchmarks/results that is written if --out names no other; None: as `settle` says.
    `overrides`: which keys of the configuration may be set; None: there are none."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = f"benchmarks/results/{result or Path(p.prog).stem + '.json, on CUDA with _cuda'}"
    p.add_argument("--out", type=Path, default=result and RESULTS / result, help=f"({default})")
    if overrides is not None:
        p.add_argument("overrides", nargs="*", metavar="key.sub=value", help=overrides)
    return p


def model_option(p: argparse.ArgumentParser) -> None:
    shipped = ", ".join(sorted(f.parent.name for f in MODELS.glob("*/config.json")))
    p.add_argument("--model", help=f"folder with a config.json, or one of {shipped}")


def settle(args: argparse.Namespace, device: torch.device, defaults: dict[str, dict], stem: str) -> None:
    """Fills in what was not asked for, by the device's type, and the model's folder."""
    cuda = "_cuda" if device.type == "cuda" else ""
    for name, value in (defaults[device.type] | {"out": RESULTS / f"{stem}{cuda}.json"}).items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.device = device
    args.model = str(MODELS / args.model) if (MODELS / args.model / "config.json").is_file() else args.model


def about(doc: str, *packages: str) -> dict:
    """The head of every result. To be called before the work: files may change meanwhile."""
    definitions = doc.partition("Definitions:\n")[2].splitlines()
    return provenance(*packages) | ({"definitions": definitions} if definitions else {})


def write(out: Path, result: dict) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
