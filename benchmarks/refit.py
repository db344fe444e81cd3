"""A refit against a plain copy of the same bytes, in one run: seconds by phase and GB/s; random weights.

    python benchmarks/refit.py
        # CPU: SmolLM2-135M in bf16; GPU: 1.5B in bf16, engines on the trainer's GPUs
    python benchmarks/refit.py --transport broadcast --engines 2
    torchrun --nproc-per-node 2 benchmarks/refit.py parallel.tp=2     any layout, parallel.* as in a recipe

On a GPU, Ray must find as many GPUs as engines, and they must be the trainer's for --transport shared.

Definitions:
    memcpy        one torch copy of as many bytes as a refit sends, on one thread (GPU: on the device), to memory that
                  was written before; one before every refit, so that both see the same machine
    refit         Refit's wall clock without the canary (metric refit/seconds); with_canary: with the engines' and the
                  trainer's scoring
    ratio         refit / memcpy, of the medians and of the least values
    fill          the export alone: all buckets written to the sender's kind of memory, nobody loading (what does not
                  overlap is the first bucket)
    load          shared on a CPU: a refit whose export writes nothing, so that the engines' loading, and the calls to
                  them, are left
    repack        CPU: vLLM's packing of all linear layers and the head from memory, alone, in this process: what an
                  engine must do beside the copy, since its matrix products read a packed layout
    begin, loading, end   parts of refit: the driver's waits for the engines' beginning, loading (what filling does not
                          hide) and ending
"""

from grpo_mcore import entry  # noqa: I001  first: what it sets in the environment must be there before torch is imported

import argparse
import dataclasses
import functools
import json
import os
import random
import statistics
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where only the package is installed

# of missing CUDA extensions, of each other's future
warnings.filterwarnings("ignore", module=r"(megatron|torch\.distributed)\..*")

from benchmarks import measure  # noqa: E402
from grpo_mcore.config import config, file as config_file, rules  # noqa: E402
from grpo_mcore.config.config import InputError  # noqa: E402
from grpo_mcore.parallel import collectives, topology  # noqa: E402
from grpo_mcore.policy.policy import Policy  # noqa: E402
from grpo_mcore.refit import weight_transfer  # noqa: E402
from grpo_mcore.refit.refit import Refit, Transfer  # noqa: E402
from grpo_mcore.refit.senders import Stream  # noqa: E402
from grpo_mcore.refit.weight_transfer import SharedMemory, num_bytes, positions  # noqa: E402
from grpo_mcore.rollout.engines import Engines  # noqa: E402

DEFAULTS = {
    "cpu": {"model": "smollm2-135m", "kv_cache_bytes": 64 << 20},
    "cuda": {"model": "1.5b", "kv_cache_bytes": 1 << 30},
}
TARGETS = {"cpu": "refit / memcpy at most 3", "cuda": "refit under 0.2 s"}


def time_waits(transfer: Transfer) -> dict[str, float]:
    """Seconds that it waits for what, from now on."""
    seconds, settle = defaultdict(float), transfer.settle

    def timed_settle(refs: dict, what: str, *how, **more) -> dict:
        start = time.perf_counter()
        try:
            return settle(refs, what, *how, **more)
        finally:
            name = what.partition(" ")[0]
            seconds[{"pausing": "begin", "receiving": "loading", "ending": "end"}.get(name, name)] += (
                time.perf_counter() - start
            )

    transfer.settle = timed_settle
    return seconds


def summary(seconds: list[float], size: int | None = None) -> dict:
    out = {"median_s": round(statistics.median(seconds), 5), "min_s": round(min(seconds), 5)}
    return out | ({"gb_per_s_of_median": round(size / 1e9 / statistics.median(seconds), 2)} if size else {})


def fill(refit: Refit, memory: SharedMemory) -> None:
    stream = Stream(refit._groups, refit._bucket_bytes, functools.partial(refit._policy.export, dtype=refit._dtype))
    if refit.transfer is None:
        return stream.drain()
    where, _ = positions(stream.buckets, stream.bucket_bytes)
    for _ in stream.fill(lambda i: memory.bytes[where[i].offset :]):
        pass


def load(refit: Refit) -> None:
    """A refit of whatever lies in the sender's memory."""

    def export(into):
        for group in refit._groups:
            for info in group:
                yield info.name, into(info.name)

    refit.transfer.send(Stream(refit._groups, refit._bucket_bytes, export), version=0, discard=False)


def repack(refit: Refit) -> Callable[[], None]:
    """Packs every matrix that an engine multiplies with, as vLLM does."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    from grpo_mcore.refit.receiver import keep_freed_memory

    keep_freed_memory()
    hf, layers = refit._policy.hf_config, []
    for group in refit._groups:
        if len(group[0].shape) == 2 and ("embed_tokens" not in group[0].name or hf.tie_word_embeddings):
            module = torch.nn.Module()
            layers.append((module, torch.randn(sum(i.shape[0] for i in group), group[0].shape[1]).to(group[0].dtype)))

    def work() -> None:
        for module, weight in layers:
            module.cpu_linear = None
            module.weight = torch.nn.Parameter(weight, requires_grad=False)
            dispatch_cpu_unquantized_gemm(module, remove_weight=True)

    return work


def run(cfg: config.Config, topo: topology.Topology, args: argparse.Namespace) -> dict:
    """Collective; the figures are the driver's."""
    cuda = topo.device.type == "cuda"
    engines = Engines(cfg, cfg.model, cuda=cuda, stop_token_ids=[]) if topo.is_driver else None
    try:
        if engines and cfg.engine.is_colocated(topo.device.type):
            engines.wait_until_ready()  # they measure the memory that the policy leaves alone, and sleep
        collectives.broadcast(None, topo)
        policy = Policy(
            cfg.model, topo, precision=cfg.precision, temperature=1.0, optimizer=cfg.optimizer, load_weights=False
        )
        if engines:
            engines.wait_until_ready()
        random.seed(1)
        canary = [[random.randrange(policy.hf_config.vocab_size) for _ in range(64)] for _ in range(4)]
        refit = Refit(policy, engines, cfg, topo, canary)
        waits = time_waits(refit.transfer) if topo.is_driver else {}
        size = num_bytes([info for group in refit._groups for info in group])
        buckets = list(weight_transfer.buckets(refit._groups, refit._bucket_bytes))
        source, target = (torch.ones(size, dtype=torch.uint8, device=topo.device) for _ in range(2))
        seconds, errors = defaultdict(list), []
        for repeat in range(args.warmup + args.repeats):
            waits.clear()
            copy = measure.seconds(lambda: target.copy_(source), topo.device)
            collectives.on_any_rank(False, topo)
            start = time.perf_counter()
            seen = refit(repeat)
            total = time.perf_counter() - start
            if repeat >= args.warmup and topo.is_driver:
                for name, s in {
                    "memcpy": copy,
                    "refit": seen["refit/seconds"].value,
                    "with_canary": total,
                    **waits,
                }.items():
                    seconds[name].append(s)
                errors.append(seen["refit/canary_abs_mean"].value)
        if not cuda:
            memory = SharedMemory(positions(buckets, refit._bucket_bytes)[1])
            seconds["fill"] = [measure.seconds(lambda: fill(refit, memory), topo.device) for _ in range(args.repeats)]
            if topo.is_driver and refit.transfer.transport == "shared_memory":
                seconds["load"] = [measure.seconds(lambda: load(refit), topo.device) for _ in range(args.repeats)]
            if topo.is_driver:
                work = repack(refit)
                for _ in range(args.warmup):
                    work()
                seconds["repack"] = [measure.seconds(work, topo.device) for _ in range(args.repeats)]
    finally:
        if engines:
            engines.stop()
    if not topo.is_driver:
        return {}
    phases = {
        name: summary(s, size if name in ("memcpy", "refit", "with_canary", "fill", "repack") else None)
        for name, s in seconds.items()
    }
    ratio = {
        f"{name}_{kind}": round(phases[name][f"{kind}_s"] / phases["memcpy"][f"{kind}_s"], 2)
        for name in ("refit", "with_canary")
        for kind in ("median", "min")
    }
    return {
        "transport": refit.transfer.transport,
        "bytes": size,
        "buckets": len(buckets),
        "bucket_bytes": refit._bucket_bytes,
        "phases": phases,
        "ratio_to_memcpy": ratio,
        "target": TARGETS[topo.device.type],
        "canary_abs_mean_max": max(errors),
    }


def options() -> argparse.Namespace:
    """Those of the command line, with the defaults of the device. Raises InputError."""
    parser = measure.parser(__doc__, overrides="of parallel.*, num_threads, engine.num_threads and device")
    measure.model_option(parser)
    parser.add_argument("--engines", type=int, help="(1; GPU: one for each rank)")
    parser.add_argument("--transport", default="auto", help="auto, broadcast or shared (auto)")
    parser.add_argument("--dtype", default="bfloat16", help="of policy and engines (bfloat16)")
    parser.add_argument("--bucket-mib", type=int, help="(refit.bucket_bytes)")
    parser.add_argument("--repeats", type=int, default=20, help="refits that count (20)")
    parser.add_argument("--warmup", type=int, default=4, help="refits before them (4)")
    args = parser.parse_intermixed_args()
    base = config_file.load(measure.MODELS / "train_step.yaml", args.overrides)
    measure.settle(args, topology.pick_device(base.device), DEFAULTS, "refit")
    if args.repeats < 1 or args.warmup < 0:
        parser.error("--repeats must be 1 or more, --warmup 0 or more")
    if args.transport not in ("auto", "broadcast", "shared"):
        raise InputError("--transport", args.transport, "must be auto, broadcast or shared", "choose among them")
    ranks, cuda = topology.world_size(), args.device.type == "cuda"
    args.cfg = dataclasses.replace(
        base,
        model=args.model,
        run_dir="runs/benchmark_refit",
        device=args.device.type,
        precision=config.Precision(params=args.dtype),
        data=dataclasses.replace(base.data, max_prompt_tokens=64),
        rollout=config.Rollout(prompts_per_step=ranks, group_size=2, max_response_tokens=64),
        batch=config.Batch(global_batch_size=ranks),
        refit=config.Refit(transport=args.transport, bucket_bytes=args.bucket_mib and args.bucket_mib << 20),
        engine=dataclasses.replace(
            base.engine,
            placement="disaggregated" if cuda and args.transport == "broadcast" else base.engine.placement,
            num_engines=args.engines or (ranks if cuda else 1),
            dtype=args.dtype,
            kv_cache_bytes=args.kv_cache_bytes,
            max_running_responses=16,
        ),
    )
    rules.check(args.cfg)
    rules.check_ranks(args.cfg, ranks)
    return args


def main() -> None:
    args = options()
    about = measure.about(__doc__) | {
        "model": json.loads(Path(args.cfg.model, "config.json").read_text()),
        "engines": args.cfg.engine.num_engines,
        "dtype": args.dtype,
        "parallel": dataclasses.asdict(args.cfg.parallel),
        "repeats": args.repeats,
        "load_average_before": os.getloadavg()[0],
    }
    topo = topology.connect(
        args.cfg.parallel, device=args.device, timeout_s=600, seed=args.cfg.seed, num_threads=args.cfg.num_threads
    )
    result = run(args.cfg, topo, args)
    if topo.is_driver:
        measure.write(args.out, {**about, "load_average_after": os.getloadavg()[0], **result})
        print(
            f"{result['bytes'] / 1e6:.0f} MB by {result['transport']} to {about['engines']} engines, "
            f"{result['buckets']} buckets\n"
        )
        for name, p in result["phases"].items():
            rate = f"{p['gb_per_s_of_median']:8.2f} GB/s" if "gb_per_s_of_median" in p else ""
            print(f"{name:12} median {p['median_s'] * 1e3:8.1f} ms, least {p['min_s'] * 1e3:8.1f} ms {rate}")
        print(
            f"refit / memcpy {result['ratio_to_memcpy']} (target: {result['target']})\nwritten to {args.out}",
            flush=True,
        )
    topology.disconnect()


if __name__ == "__main__":
    entry.run(main)
