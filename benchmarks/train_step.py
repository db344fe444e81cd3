"""The policy's part of a step, by phase: tokens/s, model FLOP utilisation and peak memory; random weights, synthetic
tokens.

    python benchmarks/train_step.py
        # CPU: SmolLM2-135M in bf16 and fp32; GPU: 1.5B in bf16 and FP8
    torchrun --nproc-per-node 2 benchmarks/train_step.py parallel.tp=2    any layout, parallel.* as in a recipe
    python benchmarks/train_step.py --model FOLDER --sequence-tokens 4096 --precision bf16,fp8-blockwise

A case is a precision at a length. All run in one process, into one file, which is written anew after each. A case that
this machine, model or layout cannot run is listed as skipped, one that runs out of memory or fails as that, and the
next one starts; but with several ranks an error ends the run, for the others would wait in a collective.

On a CPU the peak also holds what malloc cannot give back between phases, most at fp32 and long microbatches: with
MALLOC_MMAP_THRESHOLD_=262144 in the environment it does not, at the cost of the clock.

Definitions:
    step          the phases logprob (old log-probs, no gradient), forward_backward (of the update, gradient reduction
                  included) and optimizer_step (gradient norm and clipping included), over one global batch; seconds are
                  medians over the steps after the warm-up; a phase begins and ends with the device idle and all ranks
                  together
    batch         sequences of one length, a prompt and a response each; no two share a prompt; packed by
                  grpo_mcore.loss.batch
    tokens_per_s  tokens of all sequences, prompts included, padding not, over all ranks
    model_flops   forward: 2 x the layers' matrix parameters per token, 2 x the head's (vocabulary x hidden) per
                  response token (the head never sees prompt tokens), and 2 x L^2 x heads x head_dim per layer for
                  causal attention over a sequence of L tokens (L^2/2 pairs, each 2 x head_dim for q.k and 2 x head_dim
                  for weights.v, per head); forward and backward: 3 x that. Not counted: recomputation, padding,
                  embedding, norms, RoPE, softmax, optimizer
    mfu           model_flops / seconds / the ranks' peak together. Measured peak: the fastest of many products of two
                  square matrices (torch.matmul) on all ranks at once, before each case of the run: float32 for fp32,
                  else bfloat16, also for FP8. Published peak: of dense bfloat16, where the GPU is known; not for fp32
    peak_memory   on the fullest rank, from the phase's beginning to its end, with all that was there before it; of a
                  further step, which is not timed. CUDA: torch.cuda.max_memory_allocated, reset at each phase. CPU:
                  VmHWM of /proc/self/status, reset at each phase by writing 5 to /proc/self/clear_refs once malloc has
                  given back what is free (malloc_trim), minus VmRSS before the first model was built
"""

from grpo_mcore import entry  # noqa: I001  first: what it sets in the environment must be there before torch is imported

import argparse
import dataclasses
import functools
import gc
import json
import os
import statistics
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where only the package is installed

# of missing CUDA extensions, of each other's future
warnings.filterwarnings("ignore", module=r"(megatron|torch\.distributed)\..*")

from benchmarks import measure  # noqa: E402
from grpo_mcore.config import config, file as config_file, rules  # noqa: E402
from grpo_mcore.config.config import InputError  # noqa: E402
from grpo_mcore.loss import batch, loss  # noqa: E402
from grpo_mcore.parallel import collectives, topology  # noqa: E402
from grpo_mcore.parallel.topology import Topology  # noqa: E402
from grpo_mcore.plan import fit, time as plan_time  # noqa: E402
from grpo_mcore.policy import model  # noqa: E402
from grpo_mcore.policy.policy import Policy  # noqa: E402
from grpo_mcore.types import GlobalBatch  # noqa: E402

PHASES = ("logprob", "forward_backward", "optimizer_step")
PRECISIONS = {
    "bf16": {},
    "fp32": {"params": "float32"},
    **{f"fp8-{recipe}": {"fp8": recipe} for recipe in ("tensorwise", "blockwise", "delayed")},
}
DEFAULTS = {
    "cpu": {
        "model": "smollm2-135m",
        "precision": "bf16,fp32",
        "sequence_tokens": "256,1024",
        "tokens_per_step": 1024,
        "steps": 2,
    },
    "cuda": {
        "model": "1.5b",
        "precision": "bf16,fp8-tensorwise,fp8-blockwise,fp8-delayed",
        "sequence_tokens": "8192,16384,24576",
        "tokens_per_step": 98304,
        "steps": 3,
    },
}
# NVIDIA's data sheets: SXM, without sparsity
PUBLISHED_BF16_FLOPS_PER_S = {"NVIDIA H100 80GB HBM3": 989.4e12, "NVIDIA H200": 989.4e12}


def forward_flops(hf_config, num_tokens: int, num_response_tokens: int) -> int:
    """Of one sequence; see model_flops above."""
    return round(sum(plan_time.forward_flops(hf_config, num_tokens, num_response_tokens)))


def matmul_flops_per_s(dtype: str, topo: Topology) -> float:
    """The peak of all ranks together, each measured while the others work too."""
    peak = measure.matrix_flops_per_s(getattr(torch, dtype), topo.device, functools.partial(wait, topo))
    return sum(collectives.gather(peak, topo))


def wait(topo: Topology) -> None:
    """For the device, and for all ranks."""
    measure.synchronize(topo.device)
    collectives.on_any_rank(False, topo)


def release(device: torch.device) -> None:
    """Gives back what no case holds any more."""
    gc.collect()  # modules, hooks and optimizer hold each other
    measure.give_back(device)


class Phases:
    """Seconds of each step, and peak bytes of this rank in the last one, by phase."""

    def __init__(self, topo: Topology, baseline_bytes: int):
        self.topo, self.baseline_bytes = topo, baseline_bytes
        self.steps: list[dict[str, float]] = []
        self.peak_bytes: dict[str, int] = {}
        self._phase: str | None = None

    def begin(self, phase: str | None, *, memory: bool) -> None:
        """Ends the running phase, and begins another unless it is None. `memory`: measures it, at the cost of the
        clock."""
        wait(self.topo)
        if self._phase:
            self.steps[-1][self._phase] += time.perf_counter() - self._start
            if memory:
                peak = measure.peak_bytes(self.topo.device) - self.baseline_bytes
                self.peak_bytes[self._phase] = max(self.peak_bytes.get(self._phase, 0), peak)
        if memory:
            measure.reset_peak(self.topo.device)
        self._phase, self._start = phase, time.perf_counter()


def synthetic_batch(cfg: config.Config, hf_config, topo: Topology) -> GlobalBatch:
    num_sequences = cfg.batch.global_batch_size
    one_each = dataclasses.replace(cfg, rollout=dataclasses.replace(cfg.rollout, group_size=1))
    groups = fit.synthetic_groups(one_each, hf_config.vocab_size)
    advantages_PG = torch.randn(num_sequences, 1, generator=torch.Generator().manual_seed(cfg.seed))
    (out,) = batch.assemble(
        groups,
        advantages_PG,
        global_batch_size=num_sequences,
        aggregation=cfg.loss.aggregation,
        max_response_tokens=cfg.rollout.max_response_tokens,
        packing=model.packing(hf_config, topo, cfg.precision, max_tokens=cfg.batch.max_tokens_per_microbatch),
    )
    return out


def run(cfg: config.Config, topo: Topology, args: argparse.Namespace, phases: Phases) -> GlobalBatch:
    """Fills `phases` with the steps that count; returns the batch that they were over."""
    policy = Policy(
        cfg.model,
        topo,
        precision=cfg.precision,
        temperature=cfg.rollout.temperature,
        optimizer=cfg.optimizer,
        kernels=cfg.kernels,
        pointwise=loss.is_pointwise(cfg.loss),
        load_weights=False,
    )
    b, optimizer_step = synthetic_batch(cfg, policy.hf_config, topo), policy.optimizer.step

    def step_as_phase():
        begin("optimizer_step")
        out = optimizer_step()
        begin("forward_backward")  # what is left of the update: its metrics
        return out

    policy.optimizer.step = step_as_phase
    for step in range(args.warmup + args.steps + 1):
        begin = functools.partial(phases.begin, memory=step == args.warmup + args.steps)
        phases.steps.append(dict.fromkeys(PHASES, 0.0))
        begin("logprob")
        for m, logprobs_R in zip(b.microbatches, policy.logprobs(b.microbatches), strict=True):
            m.old_logprobs_R = logprobs_R
        begin("forward_backward")
        policy.update(
            b,
            functools.partial(
                loss.grpo, cfg=cfg.loss, over_ranks=functools.partial(collectives.sum_over_context, topology=topo)
            ),
            lr=cfg.optimizer.lr,
        )
        begin(None)
    phases.steps = phases.steps[args.warmup : -1]
    return b


def figures(phases: Phases, b: GlobalBatch, cfg: config.Config) -> dict:
    num_sequences = cfg.batch.global_batch_size
    forward = num_sequences * forward_flops(
        model.load_hf_config(cfg.model), b.num_tokens // num_sequences, cfg.rollout.max_response_tokens
    )
    flops = {"logprob": forward, "forward_backward": 3 * forward, "optimizer_step": 0, "step": 4 * forward}
    peak_bytes = {p: max(collectives.gather(phases.peak_bytes[p], phases.topo)) for p in PHASES}
    peak_bytes["step"] = max(peak_bytes.values())
    steps = [s | {"step": sum(s.values())} for s in phases.steps]
    of = {}
    for p in flops:
        s = statistics.median(step[p] for step in steps)
        of[p] = {"s": round(s, 4), "tokens_per_s": round(b.num_tokens / s, 1), "peak_memory_bytes": peak_bytes[p]}
        if flops[p]:
            of[p]["model_flops"] = flops[p]
    return {
        "microbatches_per_rank": len(b.microbatches),
        "packed_frac": round(b.packed_frac, 4),
        "phases": of,
        "s_of_steps": [{p: round(s, 4) for p, s in step.items()} for step in steps],
    }


def add_mfu(results: list[dict], measured: dict[str, float], published_bf16: float | None) -> None:
    """Peaks in FLOP/s of all ranks together, those measured by dtype; later cases may have raised them."""
    for r in results:
        for p in r.get("phases", {}).values():
            if "model_flops" in p:
                rate = p["model_flops"] / p["s"]
                p[f"mfu_of_measured_{r['dtype']}_peak"] = round(rate / measured[r["dtype"]], 4)
                if published_bf16 and r["dtype"] == "bfloat16":
                    p["mfu_of_published_bfloat16_peak"] = round(rate / published_bf16, 4)


def attempt(cfg: config.Config, topo: Topology, args: argparse.Namespace, baseline_bytes: int) -> dict:
    """The case's figures, or why there are none."""
    try:
        phases = Phases(topo, baseline_bytes)
        return {"status": "ok", **figures(phases, run(cfg, topo, args, phases), cfg)}
    except Exception as e:
        if topo.world_size > 1:
            raise
        reason = " ".join(str(e).split())[:300]
        # Libraries below torch have words of their own, and the CPU's allocator raises a plain RuntimeError.
        if isinstance(e, torch.OutOfMemoryError) or any(
            words in reason.lower() for words in ("out of memory", "can't allocate memory", "alloc_failed")
        ):
            return {"status": "out of memory", "reason": reason}
        traceback.print_exc()
        return {"status": "failed", "reason": f"{type(e).__name__}: {reason}"}


def options() -> argparse.Namespace:
    """Those of the command line, with the defaults of the device. Raises InputError."""
    parser = measure.parser(__doc__, overrides="of parallel.*, precision.fp8_*, num_threads and device")
    measure.model_option(parser)
    parser.add_argument("--precision", help=f"of {','.join(PRECISIONS)}")
    parser.add_argument("--sequence-tokens", help="lengths of a sequence, prompt and response, such as 8192,16384")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="of each sequence (128)")
    parser.add_argument("--tokens-per-step", type=int, help="over all ranks; at least one sequence for each data rank")
    parser.add_argument("--max-tokens-per-microbatch", type=int, help="on one rank (those of one sequence, aligned)")
    parser.add_argument("--steps", type=int, help="steps that count (CPU 2, CUDA 3)")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them (1)")
    args = parser.parse_intermixed_args()
    for override in args.overrides:
        if not override.startswith(("parallel.", "precision.fp8_", "num_threads=", "device=")):
            raise InputError(
                "override",
                override,
                "must be of parallel.*, precision.fp8_*, num_threads or device",
                "set the rest by the options of --help",
            )
    threads = max(len(os.sched_getaffinity(0)) // topology.world_size(), 1)
    args.base = config_file.load(measure.MODELS / "train_step.yaml", [f"num_threads={threads}", *args.overrides])
    measure.settle(args, topology.pick_device(args.base.device), DEFAULTS, "train_step")
    if args.steps < 1 or args.warmup < 0 or not all(n.isdecimal() for n in args.sequence_tokens.split(",")):
        parser.error(
            "--steps must be 1 or more, --warmup 0 or more, --sequence-tokens whole numbers with commas between them"
        )
    return args


def case_config(precision: str, tokens: int, args: argparse.Namespace) -> config.Config:
    """Raises InputError for what cannot run."""
    if precision not in PRECISIONS:
        raise InputError("--precision", precision, f"must be of {', '.join(PRECISIONS)}", "choose among them")
    precision_config = dataclasses.replace(args.base.precision, **PRECISIONS[precision])
    dp = max(topology.world_size() // args.base.parallel.ranks_per_replica, 1)
    num_sequences = max(args.tokens_per_step // (tokens * dp), 1) * dp
    align = 2 * config.packed_alignment(args.base.parallel, precision_config)  # a multiple of it also suits every cp
    cfg = dataclasses.replace(
        args.base,
        model=args.model,
        device=args.device.type,
        precision=precision_config,
        data=dataclasses.replace(args.base.data, max_prompt_tokens=args.prompt_tokens),
        # Enough for two such batches: the rules of groups ask for it, though one batch is all that is made.
        rollout=config.Rollout(
            prompts_per_step=num_sequences, group_size=2, max_response_tokens=tokens - args.prompt_tokens
        ),
        batch=config.Batch(
            global_batch_size=num_sequences,
            max_tokens_per_microbatch=args.max_tokens_per_microbatch or tokens + -tokens % align,
        ),
    )
    rules.check(cfg)
    rules.check_ranks(cfg, topology.world_size())
    model.check_parallel(model.load_hf_config(cfg.model), cfg.parallel, cfg.precision)
    return cfg


def table(results: list[dict]) -> str:
    lines = [
        f"{'precision':14} {'tokens':>6} {'packed':>6} | {'logprob tok/s':>13} {'MFU':>6} {'GiB':>6} | "
        f"{'fwd+bwd tok/s':>13} {'MFU':>6} {'GiB':>6} | "
        f"{'optimizer s':>11} {'GiB':>6} | {'step tok/s':>10} {'MFU':>6}   (MFU: of the measured peak)"
    ]
    for r in results:
        line = f"{r['precision']:14} {r['sequence_tokens']:6} "
        if r["status"] == "ok":
            line += f"{r['packed_frac']:6.2f}"
            for name, p in r["phases"].items():
                rate = (
                    f"{p['s']:11.3f}"
                    if name == "optimizer_step"
                    else f"{p['tokens_per_s']:{10 if name == 'step' else 13}.0f}"
                )
                mfu = "".join(f" {value:6.1%}" for key, value in p.items() if key.startswith("mfu_of_measured"))
                line += f" | {rate}{mfu}" + (f" {p['peak_memory_bytes'] / 2**30:6.2f}" if name != "step" else "")
        lines.append(line if r["status"] == "ok" else f"{line}{r['status']}: {r['reason']}")
    return "\n".join(lines)


def main() -> None:
    args = options()
    cases: dict[tuple[str, int], config.Config] = {}
    refused: dict[tuple[str, int], InputError] = {}
    wanted = [
        (precision, int(tokens))
        for precision in args.precision.split(",")
        for tokens in args.sequence_tokens.split(",")
    ]
    for key in wanted:
        try:
            cases[key] = case_config(*key, args)
        except InputError as e:
            refused[key] = e
    if not cases:
        raise refused[wanted[0]]
    cfg = next(iter(cases.values()))
    topo = topology.connect(cfg.parallel, device=args.device, timeout_s=600, seed=cfg.seed, num_threads=cfg.num_threads)
    results, measured = [], {}
    about = measure.about(__doc__) | {
        "model": json.loads(Path(cfg.model, "config.json").read_text()),
        "ranks": topo.world_size,
        "parallel": dataclasses.asdict(cfg.parallel),
        "num_threads": cfg.num_threads,
    }
    published = PUBLISHED_BF16_FLOPS_PER_S.get(about["hardware"].get("gpu"))
    matmul_flops_per_s(cfg.precision.params, topo)  # what libraries keep for themselves is no case's memory
    release(topo.device)
    baseline_bytes = 0 if topo.device.type == "cuda" else measure.held_bytes(topo.device)
    for precision, tokens in wanted:
        result = {"precision": precision, "sequence_tokens": tokens, "prompt_tokens": args.prompt_tokens}
        if case := cases.get((precision, tokens)):
            dtype = case.precision.params
            measured[dtype] = max(measured.get(dtype, 0.0), matmul_flops_per_s(dtype, topo))
            result |= {
                "dtype": dtype,
                "sequences": case.batch.global_batch_size,
                "max_tokens_per_microbatch": case.batch.max_tokens_per_microbatch,
                "load_average_before": os.getloadavg()[0],
                **attempt(case, topo, args, baseline_bytes),
            }
            release(topo.device)
        else:
            result |= {"status": "skipped", "reason": str(refused[precision, tokens])}
        results.append(result)
        if topo.is_driver:
            print(f"{precision}, {tokens} tokens: {result['status']}", file=sys.stderr, flush=True)
            add_mfu(results, measured, published and published * topo.world_size)
            peaks = {dtype: round(peak) for dtype, peak in measured.items()}
            measure.write(args.out, {**about, "measured_matmul_flops_per_s": peaks, "results": results})
    if topo.is_driver:
        print(f"written to {args.out}\n\n{table(results)}", flush=True)
    topology.disconnect()
    if any(r["status"] == "failed" for r in results):
        sys.exit(1)


if __name__ == "__main__":
    entry.run(main)
