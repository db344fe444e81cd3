"""What has to be seen on the first GPU, in the order of importance: each step with a deadline of its own, its line in
one table and its figures in one JSON, which is written anew after each; when one fails, the next one starts.

    python benchmarks/gpu_acceptance.py                      # 25 minutes; more GPUs than one add steps
    python benchmarks/gpu_acceptance.py --budget-min 9 --only versions,tests,kernels
    python benchmarks/gpu_acceptance.py --rehearse           # the same on a CPU with tiny sizes: shows that it runs

Steps that another call has done are kept in the JSON, so that a machine lent for minutes at a time suffices. Everything
that a step says is in FOLDER/NAME.log, FOLDER being the JSON's name without .json.

Definitions:
    status        ok; failed: the program ended with another status than 0, or what it left is not what it should be;
                  timed out: its deadline, or what --budget-min had left, passed; skipped: with the reason
    s             seconds by the clock
    mismatch      mean |old - rollout| log-prob of a step's tokens: what trainer and engine make of the same tokens
    canary        mean |engine - trainer| log-prob of random sequences after a refit
    kill, resume  kill -9 to all processes of the run once its second checkpoint is published, then the same command
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where only the package is installed

from benchmarks import measure
from grpo_mcore.report import run_folder

STOP_S = 15.0  # for a program to end by itself when its time is up
SIZES = {
    "cuda": {
        "kernels": ["--rows", "16384", "--vocabulary", "151936"],
        "refit": ["--model", "1.5b", "--repeats", "10"],
        "train_step": ["--model", "1.5b", "--precision", "bf16,fp8-blockwise"],
        "lengths": [8192, 16384, 24576],
        "quickstart": [
            "device=cuda",
            "precision.params=bfloat16",
            "engine.dtype=bfloat16",
            "engine.kv_cache_bytes=null",
        ],
        "steps": 8,
    },
    "cpu": {
        "kernels": ["--rows", "5", "--vocabulary", "300", "--rounds", "1"],
        "refit": ["--repeats", "1", "--warmup", "1", "--dtype", "float32"],
        "train_step": ["--model", "tiny", "--precision", "fp32", "--steps", "1", "--prompt-tokens", "16"],
        "lengths": [64, 96],
        "quickstart": ["device=cpu", "rollout.prompts_per_step=4", "rollout.group_size=4", "batch.global_batch_size=8"],
        "steps": 6,
    },
}


class Failed(RuntimeError):
    """A step did not show what it should."""


class TimedOut(RuntimeError):
    pass


class Bench:
    """Where steps run: the device, the folder for what they leave, and the deadline of the one at work."""

    def __init__(self, device: str, folder: Path):
        self.device, self.folder, self.sizes = device, folder, SIZES[device]
        self.end = 0.0  # of the step at work, by time.monotonic
        self.log = folder / "log"
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, *command: object) -> subprocess.Popen:
        argv = [sys.executable, *map(str, command)]
        env = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        # Programs and engines find the package also where it is not installed.
        env["PYTHONPATH"] = os.pathsep.join([str(measure.ROOT), *filter(None, [env.get("PYTHONPATH")])])
        with self.log.open("a") as log:
            log.write(f"$ {' '.join(argv)}\n")
            log.flush()
            return subprocess.Popen(
                argv, cwd=measure.ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self, process: subprocess.Popen, until: Callable[[], bool] = lambda: False) -> None:
        """Until it has ended, or until() holds. Raises Failed, TimedOut; then none of its processes is left."""
        try:
            while process.poll() is None and not until():
                if time.monotonic() > self.end:
                    process.send_signal(signal.SIGTERM)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(STOP_S)
                    raise TimedOut(self.last_words())
                time.sleep(0.1)
        except BaseException:
            kill(process)
            raise
        if process.poll() is not None:
            kill(process)  # what it left behind
            if process.returncode:
                raise Failed(f"ended with {process.returncode}: {self.last_words()}")

    def run(self, *command: object) -> None:
        self.wait(self.start(*command))

    def last_words(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-25:])[-3000:]

    def benchmark(self, program: str, *arguments: object, ranks: int = 1, name: str | None = None) -> dict:
        """The result of a program of this folder."""
        out = self.folder / f"{name or program}.json"
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        self.run(*launcher, f"benchmarks/{program}.py", "--out", out, *arguments)
        return json.loads(out.read_text())

    def device_of(self) -> str:
        return f"device={self.device}"


def kill(process: subprocess.Popen) -> None:
    """-9 to the whole session: the program's processes, its engines and writers."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def versions(bench: Bench) -> dict:
    """In a process of its own, since CUDA may end it."""
    out = bench.folder / "versions.json"
    bench.run(__file__, "--versions", out)
    return json.loads(out.read_text())


def write_versions(out: Path) -> None:
    said: dict[str, object] = {"python": sys.version.split()[0], "torch": torch.__version__, "cuda": torch.version.cuda}
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        said |= {
            "gpu": p.name,
            "gpus": torch.cuda.device_count(),
            "memory_gib": round(p.total_memory / 2**30, 1),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "cudnn": torch.backends.cudnn.version(),
        }
        ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        said["driver"] = subprocess.run(ask, capture_output=True, text=True, timeout=60).stdout.split("\n")[0]
    for module in ("megatron.core", "transformer_engine.pytorch", "vllm", "triton", "ray"):
        try:
            imported = __import__(module, fromlist=["__version__"])
            said[module] = getattr(imported, "__version__", "imports")
        except Exception as e:
            said[module] = f"does not import: {type(e).__name__}: {e}"[:300]
    measure.write(out, said)


def tests(bench: Bench) -> dict:
    """The tests marked gpu."""
    out = bench.folder / "tests.xml"
    out.unlink(missing_ok=True)
    try:
        bench.run("-m", "pytest", "-m", "gpu", "-q", f"--junitxml={out}")
    except Failed:
        if not out.is_file():
            raise
    cases = list(xml.etree.ElementTree.parse(out).iter("testcase"))
    names = {
        outcome: [f"{c.get('classname')}::{c.get('name')}" for c in cases if c.find(tag) is not None]
        for outcome, tag in (("failed", "failure"), ("errors", "error"), ("skipped", "skipped"))
    }
    figures = {"passed": len(cases) - sum(map(len, names.values())), **names}
    if names["failed"] or names["errors"]:
        raise Failed(f"{figures}\n{bench.last_words()}")
    if bench.device == "cuda" and not figures["passed"]:
        raise Failed(f"no test ran: {figures}")
    return figures


def kernels(bench: Bench) -> dict:
    """The head's log-probs beside public kernels."""
    result = bench.benchmark("kernels", *bench.sizes["kernels"])
    return {
        r["implementation"]: {
            "status": r["status"],
            **({"reason": r["reason"][-200:]} if r["status"] != "ok" else {}),
            **{p: r[p] for p in ("forward", "forward_backward") if r["status"] == "ok"},
            **({key: r[key] for key in ("extra_bytes", "error")} if r["status"] == "ok" else {}),
        }
        for r in result["results"]
    }


def train(bench: Bench, name: str, *overrides: str, killed: bool = False, ranks: int = 1) -> dict:
    """The quickstart's task, a few steps of it, from a model with random weights: rewards say nothing, levels do."""
    run_dir, steps = bench.folder / "runs" / name, bench.sizes["steps"]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [
        *launcher,
        "launch/train.py",
        "--cfg",
        "configs/quickstart.yaml",
        f"run_dir={run_dir}",
        f"model={random_weights(bench, 'tiny')}",
        "warm_start=null",
        f"num_steps={steps}",
        "checkpoint.every=2",
        "eval.max_prompts=8",
        f"eval.every={steps}",
        "engine.num_engines=1",
        *bench.sizes["quickstart"],
        *overrides,
    ]
    figures: dict[str, object] = {}
    if killed:
        process = bench.start(*command)
        bench.wait(process, until=lambda: len(list(run_dir.glob("checkpoints/step_*/attest.json"))) >= 2)
        if process.poll() is not None:
            raise Failed("the run was finished before it could be killed")
        kill(process)
        figures["steps when killed"] = max((row["step"] for row in run_folder.read_metrics(run_dir)), default=0)
    bench.run(*command)
    rows = [row for row in run_folder.read_metrics(run_dir) if not run_folder.is_evaluation(row)]
    if (last := rows[-1]["step"]) != steps:
        raise Failed(f"the run ended with step {last} of {steps}")
    mean = {key: sum(row[key] for row in rows if key in row) / len(rows) for key in rows[-1]}
    wanted = ("mismatch/", "refit/", "time/", "update/grad_norm", "update/loss", "memory/")
    return figures | {key: float(f"{value:.4g}") for key, value in mean.items() if key.startswith(wanted)}


def quickstart(bench: Bench) -> dict:
    """Colocated, end to end: layers, refit, sleep and wake, checkpoint, kill and resume."""
    return train(bench, "quickstart", killed=True)


def quickstart_fp8(bench: Bench) -> dict:
    """The same in FP8, in the policy and in the engine."""
    return train(bench, "quickstart_fp8", "precision.fp8=blockwise", "engine.quantization=fp8_per_block", killed=True)


def nccl_refit(bench: Bench) -> dict:
    """Engines apart from the trainer, weights by broadcast: NCCL between GPUs, gloo in a rehearsal."""
    apart = ["engine.placement=disaggregated"] if bench.device == "cuda" else []
    return train(bench, "broadcast", "refit.transport=broadcast", *apart)


def refit(bench: Bench) -> dict:
    """Random weights of 1.5B, engine and trainer on one GPU."""
    model = [] if bench.device == "cuda" else ["--model", random_weights(bench, "tiny")]
    result = bench.benchmark("refit", *bench.sizes["refit"], *model, bench.device_of())
    kept = ("transport", "bytes", "phases", "ratio_to_memcpy", "canary_abs_mean_max")
    return {key: result[key] for key in kept if key in result}


def train_step(bench: Bench, *overrides: str, ranks: int = 1, name: str | None = None) -> dict:
    """The policy's part of a step at each length: a process each, since one that runs out of memory spoils the next."""
    figures = {}
    for length in bench.sizes["lengths"][-1:] if overrides else bench.sizes["lengths"]:
        result = bench.benchmark(
            "train_step",
            *bench.sizes["train_step"],
            *("--sequence-tokens", length, "--tokens-per-step", 2 * length * ranks),
            *(bench.device_of(), *overrides),
            ranks=ranks,
            name=f"{name or 'train_step'}_{length}",
        )
        for r in result["results"]:
            case = f"{r['precision']} {length}"
            figures[case] = r["reason"] if r["status"] != "ok" else {k: r["phases"][k] for k in r["phases"]}
    if all(isinstance(case, str) for case in figures.values()):
        raise Failed(str(figures))
    return figures


def fit(bench: Bench) -> dict:
    """The 8K preset, as one rank of its data parallel ones sees it, beside what launch/plan.py foretells."""
    overrides = [
        f"model={random_weights(bench, '1.5b' if bench.device == 'cuda' else 'tiny')}",
        f"run_dir={bench.folder / 'runs/fit'}",
        "recipe=null",
        "engine.num_engines=1",
        "data.train=arithmetic:two_digit_sums/train",
        "data.prompt_template={problem}=",
        "data.chat_template=false",
        "eval.data=arithmetic:two_digit_sums/heldout",
    ]
    if bench.device == "cpu":
        tiny = (
            "rollout.max_total_tokens=64 rollout.max_response_tokens=40 data.max_prompt_tokens=8 rollout.group_size=4"
        )
        tiny += " rollout.prompts_per_step=4 batch.global_batch_size=8 batch.max_tokens_per_microbatch=512"
        tiny += " precision.params=float32 engine.dtype=float32 engine.kv_cache_bytes=67108864 device=cpu"
        overrides += ["engine.placement=cpu", "engine.offload_trainer=[]", *tiny.split()]
    figures = {}
    for name, command in (
        ("plan", ["launch/plan.py", "--gpu", plan_gpu(bench), "--num-gpus", "1"] if bench.device == "cuda" else None),
        ("fit", ["launch/train.py", "--fit"]),
    ):
        if command:
            before = bench.log.stat().st_size if bench.log.is_file() else 0
            bench.run(command[0], "--cfg", "configs/deepscaler_8k.yaml", *command[1:], *overrides)
            said = bench.log.read_bytes()[before:].decode(errors="replace").splitlines()[1:]
            figures[name] = [line for line in said if line.strip()][-40:]
    return figures


def plan_gpu(bench: Bench) -> str:
    """The planner's name of the GPU that is here. Raises Failed."""
    from grpo_mcore.plan import memory

    here = torch.cuda.get_device_properties(0)
    for name, known in memory.GPUS.items():
        if name.split("-")[0].upper() in here.name and abs(here.total_memory / known.memory_bytes - 1) < 0.1:
            return name
    raise Failed(f"launch/plan.py does not know {here.name}")


def random_weights(bench: Bench, size: str) -> Path:
    """A folder as from the hub, of the quickstart's shape (tiny) or one of configs/benchmarks: random weights, a
    tokenizer of characters."""
    folder = bench.folder / "models" / size
    if not (folder / "model.safetensors").is_file():
        bench.run(__file__, "--random-weights", size, "--out", folder)
    return folder


def write_random_weights(size: str, folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from grpo_mcore.data import arithmetic

    arithmetic.make_model(folder, seed=1)
    if size != "tiny":
        shape = AutoConfig.from_pretrained(measure.MODELS / size)
        shape.eos_token_id, shape.pad_token_id = 1, 0
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).save_pretrained(folder)


@dataclass(frozen=True)
class Step:
    run: Callable[[Bench], dict]
    minutes: float
    gpus: int = 1
    on_cpu: str | None = None  # why a rehearsal leaves it out

    @property
    def name(self) -> str:
        return self.run.__name__

    def why_not(self, bench: Bench) -> str | None:
        if bench.device == "cpu":
            return self.on_cpu
        return f"needs {self.gpus} GPUs" if torch.cuda.device_count() < self.gpus else None


def tp2(bench: Bench) -> dict:
    """The longest length on two tensor parallel ranks."""
    return train_step(bench, "parallel.tp=2", "parallel.sequence_parallel=true", ranks=2, name="tp2")


def cp2(bench: Bench) -> dict:
    """The longest length on two context parallel ranks."""
    return train_step(bench, "parallel.cp=2", ranks=2, name="cp2")


STEPS = (
    Step(versions, 2),
    Step(tests, 4),
    Step(kernels, 4),
    Step(quickstart, 6),
    Step(quickstart_fp8, 6, on_cpu="FP8 layers need a GPU"),
    Step(nccl_refit, 4, gpus=2),
    Step(refit, 4),
    Step(train_step, 6),
    Step(fit, 6),
    Step(tp2, 3, gpus=2),
    Step(cp2, 3, gpus=2),
)


def take(step: Step, bench: Bench, left_s: float) -> dict:
    """Runs a step. What the JSON says of it."""
    what = (step.run.__doc__ or "").split("\n\n")[0].replace("\n   ", "")
    if reason := step.why_not(bench) or (left_s < 20 and "no time is left of --budget-min"):
        return {"name": step.name, "what": what, "status": "skipped", "reason": reason}
    bench.log = bench.folder / f"{step.name}.log"
    bench.log.write_text("")
    deadline_s, start = min(60 * step.minutes, left_s), time.monotonic()
    bench.end = start + deadline_s
    outcome: dict = {"status": "ok"}
    try:
        outcome["figures"] = step.run(bench)
    except TimedOut as e:
        outcome = {"status": "timed out", "reason": f"not done after {deadline_s:.0f} s; its last words:\n{e}"}
    except Exception as e:  # the next step starts
        outcome = {"status": "failed", "reason": f"{type(e).__name__}: {e}"[:4000]}
    return {"name": step.name, "what": what, "s": round(time.monotonic() - start, 1), **outcome}


def line(step: dict) -> str:
    reason = (step.get("reason") or "").strip().splitlines()
    return f"{step['name']:15} {step['status']:10} {step.get('s', 0):7.1f} s  {reason[-1][:100] if reason else ''}"


def main() -> None:
    parser = measure.parser(__doc__, overrides=None)
    parser.add_argument("--budget-min", type=float, default=25.0, help="of all steps together (25)")
    parser.add_argument("--only", metavar="A,B", help=f"of {', '.join(s.name for s in STEPS)}")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with tiny sizes")
    parser.add_argument("--versions", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--random-weights", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.versions:
        return write_versions(args.versions)
    if args.random_weights:
        return write_random_weights(args.random_weights, args.out)
    device = "cpu" if args.rehearse else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU. Remedy: --rehearse, which runs the same on a CPU with tiny sizes")
    names = args.only.split(",") if args.only else [s.name for s in STEPS]
    if unknown := set(names) - {s.name for s in STEPS}:
        parser.error(f"--only = {args.only}: {unknown.pop()} is not one of {', '.join(s.name for s in STEPS)}")
    end = time.monotonic() + 60 * args.budget_min
    out = args.out or (Path("runs/gpu_rehearsal.json") if args.rehearse else measure.RESULTS / "gpu_acceptance.json")
    result = measure.about(__doc__, "transformer-engine-torch") | {"rehearsal": args.rehearse, "steps": []}
    earlier = json.loads(out.read_text()) if out.is_file() else {}
    if all(earlier.get(key) == result[key] for key in ("git_commit", "hardware", "versions")):
        result["steps"] = [s for s in earlier["steps"] if s["name"] not in names]
    bench = Bench(device, out.resolve().with_suffix(""))
    for step in STEPS:
        if step.name in names:
            taken = take(step, bench, end - time.monotonic())
            print(line(taken), flush=True)
            order = [s.name for s in STEPS]
            result["steps"] = sorted([*result["steps"], taken], key=lambda s: order.index(s["name"]))
            measure.write(out, result)
    print("\n".join(["", str(out), *map(line, result["steps"])]))
    raise SystemExit(any(s["status"] in ("failed", "timed out") for s in result["steps"]))


if __name__ == "__main__":
    main()
