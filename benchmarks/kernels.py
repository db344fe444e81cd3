"""Log-prob of a linear head: time, peak memory and error of this project's forms, the naive one, and public fused
kernels.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/kernels.py
        # CPU: the naive form and this project's plain ones; GPU: all that is installed, all sizes
    python benchmarks/kernels.py --search
        # GPU: block sizes for kernels/linear_logprob.py, by trial
    python benchmarks/kernels.py --rows 4096 --vocabulary 151936 --only triton,chunked

Each implementation runs in a process of its own, so that no other's leftovers count; rounds alternate between them.
What is not installed or cannot run is listed with the reason.

Definitions:
    input         hidden [rows, 1536] and weight [vocabulary, 1536], bfloat16, random, logits with a standard deviation
                  of 2; temperature 1
    forward       log-prob of a random target and, where has_entropy, the entropy, of each row; no gradient
    forward_backward  the same, then the gradients of hidden and weight for a random upstream gradient of the log-probs
    s             seconds by the clock (CUDA: by events), median of the repetitions after a warm-up; on a CPU cpu_s too,
                  processor seconds, which other work on the machine spoils less; time_of_naive: this / the naive form's
                  seconds (CPU: processor seconds), median over rounds
    extra_bytes   peak memory of the first forward_backward beyond what was there before and the two gradients. CUDA:
                  torch.cuda.max_memory_allocated, after a warm-up. CPU: VmHWM of /proc/self/status, reset through
                  /proc/self/clear_refs. main_grad, where there is one, was there before
    logits once   kernels/linear_grpo.py, which takes the gradients of the loss together with its log-probs
    share_of_peak 2 x rows x 1536 x vocabulary FLOPs, once for forward and three times for forward_backward, whatever is
                  recomputed, / s / the fastest of many products of two square bfloat16 matrices (matmul_flops_per_s)
    error         largest |difference| from float64: log-probs and entropies of all rows, gradients of 64 rows and of
                  256 vocabulary rows; of a gradient divided by the true one's largest element there
"""

import argparse
import functools
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the kernels need nothing that would have to be installed

from benchmarks import measure
from grpo_mcore.kernels import reference
from grpo_mcore.kernels.pick import pick, pick_grpo

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
D = 1536
ROWS, VOCABULARY = ("1024,4096,8192,16384,24576,32768", "151936,75968") if CUDA else ("2048", "151936")
ON_CPU = "naive", "chunked", "chunked with main_grad", "logits once", "logits once with main_grad"
ROUNDS, REPETITIONS = (1, 10) if CUDA else (3, 1)
SEARCH_ROWS = 16384  # what few rows need of caches and memory is not what a training step's need
PEERS = ("trl", "liger-kernel", "cut-cross-entropy", "verl", "quack-kernels")


# Implementations: (hidden, weight, target) -> (logprob [T], entropy [T] or None). Imports are theirs: most are
# installed nowhere.


def _ours(linear_logprob):
    def run(hidden, weight, target):
        logsumexp, at_target, mean = linear_logprob(hidden, weight, target, temperature=1.0)
        return at_target - logsumexp, logsumexp - mean

    return run


def _naive():
    def linear_logprob(hidden, weight, target, *, temperature):
        z = (hidden @ weight.T).float() / temperature
        return z.logsumexp(1), z.gather(1, target[:, None])[:, 0], (z.softmax(1) * z).sum(1)

    return _ours(linear_logprob)


def _triton():
    return _ours(pick("triton"))


def _with_main_grad(linear_logprob):
    def run(hidden, weight, target, *, temperature):
        return linear_logprob(hidden, weight, target, temperature=temperature, main_grad_VD=main_grad(weight))

    return _ours(run)


@functools.cache
def _buffer(shape: torch.Size) -> torch.Tensor:
    return torch.full(shape, 0.0, device=DEVICE)  # written, so that a CPU's memory is there


def main_grad(weight: torch.Tensor) -> torch.Tensor:
    """Where gradients of this weight are added up, float32."""
    return _buffer(weight.shape)


class LogitsOnce:
    """This benchmark's loss, sum of upstream x log-prob, is pointwise: linear_grpo has its gradients at once."""

    def __init__(self, in_main_grad: bool):
        self.in_main_grad = in_main_grad
        self.linear_grpo = pick_grpo(wanted=True, pointwise=True)

    def __call__(self, hidden, weight, target):
        return self.linear_grpo(hidden, weight, target, None, temperature=1.0)[1:]

    def loss(self, hidden, weight, target, upstream):
        """(loss, logprob, entropy)"""
        buffer = main_grad(weight) if self.in_main_grad else None

        def of_rows(logprob, _, rows):
            return (upstream[rows] * logprob).sum()

        return self.linear_grpo(hidden, weight, target, of_rows, temperature=1.0, main_grad_VD=buffer)


def _trl():
    from trl.kernels import ChunkedLogProbFunction

    return lambda h, w, y: ChunkedLogProbFunction.apply(h, w, None, y, 1.0, 32768, None, 1.0, ("entropy",))[:2]


def _liger():
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    def run(h, w, y):
        nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(h, w, y, 1.0, -100, 1, True)
        return -nll, entropy

    return run


def _cut_cross_entropy():
    from cut_cross_entropy import linear_cross_entropy

    return lambda h, w, y: (-linear_cross_entropy(h, w, y, reduction="none", filter_eps=None), None)


def _verl():
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return lambda h, w, y: linear_cross_entropy(h, w, y, 1.0, "none", None)


def _quack():
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda h, w, y: (-chunked_linear_cross_entropy(h, w, y, chunk_size=4096, reduction="sum"), None)


IMPLEMENTATIONS = {
    "naive": _naive,
    "chunked": lambda: _ours(reference.linear_logprob),
    "chunked with main_grad": lambda: _with_main_grad(reference.linear_logprob),
    "logits once": lambda: LogitsOnce(in_main_grad=False),
    "logits once with main_grad": lambda: LogitsOnce(in_main_grad=True),
    "triton": _triton,
    "triton with main_grad": lambda: _with_main_grad(pick("triton")),
    "trl": _trl,
    "liger": _liger,
    "cut-cross-entropy": _cut_cross_entropy,
    "verl": _verl,
    "quack (sum of the loss only)": _quack,
}


def inputs(rows: int, vocabulary: int):
    """hidden, weight, target, upstream gradient; the same on every call."""
    g = torch.Generator(DEVICE).manual_seed(rows)
    hidden = torch.randn(rows, D, generator=g, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(vocabulary, D, generator=g, device=DEVICE, dtype=torch.bfloat16).mul_(2 / D**0.5)
    target = torch.randint(0, vocabulary, (rows,), generator=g, device=DEVICE)
    return hidden.requires_grad_(), weight.requires_grad_(), target, torch.randn(rows, generator=g, device=DEVICE)


def samples(rows: int, vocabulary: int, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows and the vocabulary rows, half of them targets, whose gradients are compared."""
    some = torch.linspace(0, rows - 1, min(rows, 64), device=DEVICE).long()
    return some, torch.cat([torch.linspace(0, vocabulary - 1, 128, device=DEVICE).long(), target[:128]])


@torch.no_grad()
def truth(rows: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """float64, in chunks of the vocabulary."""
    hidden, weight, target, upstream = inputs(rows, vocabulary)
    some_rows, some_columns = samples(rows, vocabulary, target)
    h, parts = hidden.double(), []
    for start in range(0, vocabulary, 4096):
        z = h @ weight[start : start + 4096].double().T
        parts.append((z.logsumexp(1), (z.softmax(1) * z).sum(1)))
    logsumexp_KT, mean_KT = (torch.stack(x) for x in zip(*parts, strict=True))
    logsumexp = logsumexp_KT.logsumexp(0)
    logprob = (h * weight[target].double()).sum(1) - logsumexp
    d_hidden = weight[target[some_rows]].double()  # of each row's log-prob: its target's weight less the mean one
    for start in range(0, vocabulary, 4096):
        w = weight[start : start + 4096].double()
        d_hidden -= (h[some_rows] @ w.T - logsumexp[some_rows, None]).exp() @ w
    dz = (target[:, None] == some_columns).double() - (h @ weight[some_columns].double().T - logsumexp[:, None]).exp()
    return {
        "logprob": logprob,
        "entropy": logsumexp - ((logsumexp_KT - logsumexp).exp() * mean_KT).sum(0),
        "d_hidden": d_hidden * upstream[some_rows, None].double(),
        "d_weight": (dz * upstream[:, None].double()).T @ h,
    }


def differentiate(function, hidden, weight, target, upstream):
    """(logprob, entropy or None, gradients)"""
    if isinstance(function, LogitsOnce):
        loss, logprob, entropy = function.loss(hidden, weight, target, upstream)
    else:
        logprob, entropy = function(hidden, weight, target)
        loss = (upstream * logprob).sum() if logprob.dim() else logprob
    return (
        logprob.detach(),
        None if entropy is None else entropy.detach(),
        torch.autograd.grad(loss, (hidden, weight), allow_unused=True),
    )


def errors(
    result, exact: dict[str, torch.Tensor], rows: int, vocabulary: int, target: torch.Tensor
) -> dict[str, float]:
    logprob, entropy, (d_hidden, d_weight) = result
    if not logprob.dim():
        return {}
    out, (some_rows, some_columns) = {}, samples(rows, vocabulary, target)
    for name, x, relative in (
        ("logprob", logprob, False),
        ("entropy", entropy, False),
        ("d_hidden", d_hidden, True),
        ("d_weight", d_weight, True),
    ):
        if x is not None:
            x = x[some_rows] if name == "d_hidden" else x[some_columns] if name == "d_weight" else x
            difference = (x.double() - exact[name]).abs().max()
            out[name] = (difference / exact[name].abs().max() if relative else difference).item()
    return out


def peak_beyond(function) -> tuple[int, object]:
    """(bytes of the peak beyond what was there before, what the function gave)"""
    measure.synchronize(DEVICE)
    measure.reset_peak(DEVICE)
    before, result = measure.held_bytes(DEVICE), function()
    return measure.peak_bytes(DEVICE) - before, result


def seconds(function, repetitions: int) -> dict[str, list[float]]:
    """By the clock, and on a CPU the processor's; of each repetition."""
    out = {"s": [], "cpu_s": []}
    for _ in range(repetitions):
        if CUDA:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            end.synchronize()
            out["s"].append(begin.elapsed_time(end) / 1e3)
        else:
            usage, clock = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
            function()
            out["s"].append(time.perf_counter() - clock)
            after = resource.getrusage(resource.RUSAGE_SELF)
            out["cpu_s"].append(after.ru_utime + after.ru_stime - usage.ru_utime - usage.ru_stime)
    return out


def case(name: str, rows: int, vocabulary: int, repetitions: int, exact: Path) -> dict:
    """One implementation at one size, in this process."""
    function = IMPLEMENTATIONS[name]()
    hidden, weight, target, upstream = inputs(rows, vocabulary)

    def both():
        return differentiate(function, hidden, weight, target, upstream)

    @torch.no_grad()
    def forward():
        return function(hidden, weight, target)

    if "main_grad" in name:
        main_grad(weight)  # is there before the memory is measured

    # CUDA compiles and takes workspaces at first. On a CPU the first pass is the one without malloc's leftovers.
    both() if CUDA else differentiate(function, hidden[:32], weight[:4096], target[:32] % 4096, upstream[:32])
    extra_bytes, result = peak_beyond(both)
    gradient_bytes = sum(g.nbytes for g in result[2] if g is not None)
    out = {
        "has_entropy": result[1] is not None,
        "extra_bytes": extra_bytes - gradient_bytes,
        "error": errors(result, torch.load(exact), rows, vocabulary, target),
    }
    del result
    return out | {"forward": seconds(forward, repetitions), "forward_backward": seconds(both, repetitions)}


def child(*arguments: str) -> dict:
    """What this program prints, run with these arguments in a process of its own."""
    done = subprocess.run([sys.executable, __file__, *arguments], cwd=measure.ROOT, capture_output=True, text=True)
    if done.returncode:
        if arguments[arguments.index("--child") + 1] in ("truth", "peak"):
            raise RuntimeError(done.stderr)
        return {
            "status": "failed",
            "reason": (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1][:300],
        }
    return json.loads(done.stdout.splitlines()[-1])


def run_child(args: argparse.Namespace) -> dict:
    name, rows, vocabulary, folder = args.child[0], *map(int, args.child[1:3]), Path(args.child[3])
    if name == "truth":
        torch.save(truth(rows, vocabulary), folder / "truth.pt")
        return {}
    if name == "peak":
        return {"matmul_flops_per_s": measure.matrix_flops_per_s(torch.bfloat16, DEVICE)}
    try:
        return {"status": "ok", **case(name, rows, vocabulary, args.repetitions, folder / "truth.pt")}
    except torch.OutOfMemoryError:
        return {"status": "out of memory"}
    except (ImportError, ValueError) as e:  # not installed; or it says that it cannot
        return {"status": "skipped", "reason": f"{type(e).__name__}: {e}"[:300]}


def of_rounds(rounds: list[dict], naive: list[dict], rows: int, vocabulary: int, peak: float) -> dict:
    """One result of several; `naive`: the naive form's in the same rounds."""
    bad = [r for r in rounds if r["status"] != "ok"]
    if bad:
        return bad[0]
    out = {
        "status": "ok",
        "has_entropy": rounds[0]["has_entropy"],
        "extra_bytes": max(r["extra_bytes"] for r in rounds),
        "error": rounds[0]["error"],
    }
    for pass_, products in (("forward", 1), ("forward_backward", 3)):
        clock = statistics.median(s for r in rounds for s in r[pass_]["s"])
        out[pass_] = {"s": clock, "share_of_peak": products * 2 * rows * D * vocabulary / clock / peak}
        key = "s" if CUDA else "cpu_s"
        if not CUDA:
            out[pass_]["cpu_s"] = statistics.median(s for r in rounds for s in r[pass_]["cpu_s"])
        if naive and all(r["status"] == "ok" for r in naive):
            ratios = [
                statistics.median(r[pass_][key]) / statistics.median(n[pass_][key])
                for r, n in zip(rounds, naive, strict=True)
            ]
            out[pass_]["time_of_naive"] = statistics.median(ratios)
    return out


def search(rows: int, vocabulary: int) -> None:
    """Times block sizes of the forward, then of dz's kernel, then the rectangles of dz, each with the best of the
    former; prints the best."""
    from grpo_mcore.kernels import linear_logprob as kernel

    hidden, weight, target, upstream = inputs(rows, vocabulary)
    run = _triton()

    def trial(label, function) -> float:
        try:
            function()
            best = statistics.median(seconds(function, 5)["s"])
        except Exception as e:  # what does not compile or fit is no candidate
            print(f"{label}: {type(e).__name__}", flush=True)
            return float("inf")
        print(f"{label}: {best * 1e3:.2f} ms", flush=True)
        return best

    @torch.no_grad()
    def forward():
        run(hidden, weight, target)

    candidates = [
        kernel.Blocks(*x) for x in itertools.product((64, 128, 256), (128, 256), (64, 128), (4, 8), (2, 3, 4, 5))
    ]
    candidates = [
        b
        for b in candidates
        if 64 <= b.T * b.V / (32 * b.warps) <= 128 and (b.T + b.V) * b.D * 2 * b.stages <= 224 << 10
    ]
    for name, table, function in (
        ("forward", kernel.FORWARD, forward),
        ("backward", kernel.BACKWARD, lambda: differentiate(run, hidden, weight, target, upstream)),
    ):
        times = {}
        for blocks in candidates:
            table[torch.bfloat16] = blocks
            times[blocks] = trial(f"{name} {tuple(blocks)}", function)
        table[torch.bfloat16] = min(times, key=times.get)
        print(f"best {name.upper()}: {table[torch.bfloat16]}", flush=True)
    times = {}
    for size in itertools.product((4096, 8192, 1 << 30), (128 << 20, 256 << 20, 512 << 20, 1 << 30), (16, 32, 64)):
        kernel.ROWS, kernel.WORKSPACE_BYTES, kernel.GROUP = size
        times[size] = trial(f"ROWS, WORKSPACE_BYTES, GROUP {size}", function)
    print(f"best ROWS, WORKSPACE_BYTES, GROUP: {min(times, key=times.get)}", flush=True)


def table(results: list[dict]) -> str:
    lines = [
        f"{'rows':>6} {'vocabulary':>10} {'implementation':28} | {'forward s':>10} {'of naive':>8} {'of peak':>7} "
        f"| {'fwd+bwd s':>10} {'of naive':>8} {'of peak':>7} | "
        f"{'extra MB':>9} | errors: logprob, entropy, d_hidden, d_weight"
    ]
    for r in results:
        line = f"{r['rows']:6} {r['vocabulary']:10} {r['implementation']:28} "
        if r["status"] != "ok":
            lines.append(f"{line}| {r['status']}: {r.get('reason', '')}"[:160])
            continue
        for p in (r["forward"], r["forward_backward"]):
            line += f"| {p['s']:10.4f} {p.get('time_of_naive', float('nan')):8.2f} {p['share_of_peak']:7.1%} "
        lines.append(
            line
            + f"| {r['extra_bytes'] / 1e6:9.1f} | "
            + "  ".join(
                f"{r['error'][k]:.1e}" if k in r["error"] else "-"
                for k in ("logprob", "entropy", "d_hidden", "d_weight")
            )
        )
    return "\n".join(lines)


def main() -> None:
    parser = measure.parser(__doc__, f"kernels{'_cuda' if CUDA else ''}.json", overrides=None)
    parser.add_argument("--rows", default=ROWS, help=f"({ROWS})")
    parser.add_argument("--vocabulary", default=VOCABULARY, help=f"({VOCABULARY})")
    parser.add_argument(
        "--only",
        default=",".join(n for n in IMPLEMENTATIONS if CUDA or n in ON_CPU),
        help=f"of {', '.join(IMPLEMENTATIONS)}, with commas between them",
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--repetitions", type=int, default=REPETITIONS, help="in each round")
    parser.add_argument(
        "--search",
        action="store_true",
        help=f"instead: block sizes, by trial, at the first of --rows, or {SEARCH_ROWS}, and --vocabulary; needs a GPU",
    )
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(run_child(args)))
        return
    sizes = [(int(rows), int(vocabulary)) for vocabulary in args.vocabulary.split(",") for rows in args.rows.split(",")]
    if args.search:
        search(SEARCH_ROWS if args.rows == ROWS else sizes[0][0], sizes[0][1])
        return
    names = args.only.split(",")
    threads = {name: os.environ[name] for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY") if name in os.environ}
    about = measure.about(__doc__, *PEERS)
    about |= {"environment": threads, "rounds": args.rounds, "repetitions": args.repetitions}
    results = []
    with tempfile.TemporaryDirectory() as folder:
        peak = child("--child", "peak", "0", "0", folder)["matmul_flops_per_s"]
        for rows, vocabulary in sizes:
            size = str(rows), str(vocabulary), folder
            child("--child", "truth", *size)
            rounds = {name: [] for name in names}
            for _ in range(args.rounds):
                for name in names:
                    rounds[name].append(child("--repetitions", str(args.repetitions), "--child", name, *size))
                    print(f"{rows} x {vocabulary} {name}: {rounds[name][-1]['status']}", file=sys.stderr, flush=True)
            for name in names:
                result = of_rounds(rounds[name], rounds.get("naive", []), rows, vocabulary, peak)
                size = {"implementation": name, "rows": rows, "vocabulary": vocabulary}
                results.append({**size, "load_average": os.getloadavg()[0], **result})
            measure.write(args.out, {**about, "matmul_flops_per_s": peak, "results": results})
    print(f"written to {args.out}\n\n{table(results)}", flush=True)


if __name__ == "__main__":
    main()
