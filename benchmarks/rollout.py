"""What vLLM engines take, as this project runs them: seconds of an iteration, of a prompt, of a response's start; and a
long-tailed load.

    python benchmarks/rollout.py --cfg configs/quickstart.yaml
        # the engines of a configuration, all of them loaded alike
    python benchmarks/rollout.py --cfg FILE engine.num_engines=1 rollout.max_response_tokens=512 --running 1,8,64
    python benchmarks/rollout.py --cfg FILE device=cuda engine.placement=disaggregated      GPUs

No token ends a response: every length is the one asked for. The result's `profile` is what
launch/plan.py simulate --profile reads.

Definitions:
    running       responses of one engine at once, in groups of rollout.group_size (fewer: one group)
    iteration_s   seconds in which every running response gains a token, with an empty cache: (seconds to make L2 tokens
                  each - seconds to make L1) / (L2 - L1), less kv_token_s x the tokens in the cache meanwhile; L1, L2 =
                  a quarter of rollout.max_response_tokens, all
    kv_token_s    an iteration's more per token in the cache: the most running, prompts of data.max_prompt_tokens
                  against a quarter of that
    prefill_token_s  per prompt token computed, siblings computing only what fills no block of the prefix cache;
                  response_s: per response that starts; both from 1 token each, at these two lengths of prompts
    prefix_cache  seconds to make 1 token each: groups of siblings, against as many prompts of their own
    load          --load responses per engine of log-normal length (median a quarter of rollout.max_response_tokens,
                  mean 1.4 x that, cut at it; alike within a group), submitted at once and dealt out by
                  grpo_mcore.rollout.dispatch; beside it what simulate.py makes of the same lengths with this profile
    all           medians over --rounds, which alternate between all of these; the slowest engine counts; by the clock,
                  other work on the machine included
"""

from grpo_mcore import entry  # noqa: I001  first: what it sets in the environment must be there before torch is imported

import argparse
import dataclasses
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import ray
from transformers import AutoConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where only the package is installed

from benchmarks import measure
from grpo_mcore.config import config, file as config_file
from grpo_mcore.data import arithmetic
from grpo_mcore.parallel import topology
from grpo_mcore.plan import cluster, memory, predict
from grpo_mcore.plan.cluster import Cluster, Draw, EngineProfile, LogNormal, TrainerProfile
from grpo_mcore.policy import model
from grpo_mcore.policy.model_folder import local_folder
from grpo_mcore.rollout.engine import Sampling
from grpo_mcore.rollout.engines import Engines

CPU_BLOCK_TOKENS = 32  # of engine.arguments


class Bench:
    """Engines, and timed work for them."""

    def __init__(self, cfg: config.Config, engines: Engines):
        self.cfg, self.engines = cfg, engines
        self._rng, self._num_requests = random.Random(cfg.seed), 0
        self._vocabulary = AutoConfig.from_pretrained(cfg.model).vocab_size

    def prompt(self, num_tokens: int) -> list[int]:
        return self._rng.choices(range(self._vocabulary), k=num_tokens)

    def alike(self, running: int, prompt_tokens: int, max_tokens: int, group_size: int) -> float:
        """Seconds until every engine has made this many tokens for each response."""
        requests = []
        for slot in self.engines.ready:
            for first in range(0, running, group_size):
                self._num_requests -= 1  # names that Engines, which counts up, does not give
                sampling = Sampling(
                    min(group_size, running - first),
                    self.cfg.rollout.temperature,
                    max_tokens,
                    self._num_requests & 0xFFFF,
                )
                requests.append((slot.actor, self._num_requests, self.prompt(prompt_tokens), sampling))
        start = time.perf_counter()
        answers = ray.get(
            [actor.generate.remote(*request) for actor, *request in requests], timeout=self.cfg.rollout.timeout_s
        )
        seconds = time.perf_counter() - start
        if {len(c.token_ids) for answer in answers for c in answer} != {max_tokens}:
            raise RuntimeError(
                f"a response is not {max_tokens} tokens long, but "
                f"{sorted({len(c.token_ids) for answer in answers for c in answer})}"
            )
        return seconds

    def load(self, draws: list[Draw]) -> float:
        """Seconds until all of these are sampled."""
        start = time.perf_counter()
        answers = [
            self.engines.submit(
                (i,),
                self.prompt(d.prompt_tokens),
                Sampling(len(d.response_tokens), self.cfg.rollout.temperature, d.response_tokens[0], i),
                "load",
            )
            for i, d in enumerate(draws)
        ]
        for answer in answers:
            answer.result(self.cfg.rollout.timeout_s)
        return time.perf_counter() - start


def sizes(cfg: config.Config) -> tuple[tuple[int, int], tuple[int, int]]:
    """Short and long: prompts, responses."""
    p, r = cfg.data.max_prompt_tokens, cfg.rollout.max_response_tokens
    return (max(p // 4, 1), p), (max(r // 4, 1), r)


def works(bench: Bench, runnings: list[int], draws: list[Draw]) -> dict[str, Callable[[], float]]:
    """All that is timed, by name."""
    (p0, p1), (l0, l1) = sizes(bench.cfg)
    most, G = runnings[-1], bench.cfg.rollout.group_size
    out = {
        f"{n} running, {length} tokens": lambda n=n, length=length: bench.alike(n, p0, length, G)
        for n in runnings
        for length in (l0, l1)
    }
    out |= {
        f"long prompts, {length} tokens": lambda length=length: bench.alike(most, p1, length, G) for length in (l0, l1)
    }
    out |= {f"prompts of {p}": lambda p=p: bench.alike(most, p, 1, G) for p in (p0, p1)}
    return out | {"no siblings": lambda: bench.alike(most, p1, 1, 1), "load": lambda: bench.load(draws)}


def computed_tokens(running: int, group_size: int, prompt_tokens: int, block: int) -> int:
    """Of prompts, in one engine."""
    groups = -(-running // group_size)
    rest = (prompt_tokens - 1) % block + 1 if block else prompt_tokens
    return groups * prompt_tokens + (running - groups) * rest


def profile_of(cfg: config.Config, seconds: dict[str, float], runnings: list[int], block: int) -> EngineProfile:
    """See the definitions."""
    (p0, p1), (l0, l1) = sizes(cfg)
    most, G = runnings[-1], cfg.rollout.group_size

    def iteration(what: str) -> float:
        return (seconds[f"{what}, {l1} tokens"] - seconds[f"{what}, {l0} tokens"]) / (l1 - l0)

    kv_token_s = max(iteration("long prompts") - iteration(f"{most} running"), 0) / (most * (p1 - p0))
    iteration_s = tuple((n, iteration(f"{n} running") - kv_token_s * n * (p0 + (l0 + l1 - 1) / 2)) for n in runnings)
    tokens = [computed_tokens(most, G, p, block) for p in (p0, p1)]
    short, long = (seconds[f"prompts of {p}"] - kv_token_s * most * p for p in (p0, p1))
    prefill_token_s = max(long - short, 0) / (tokens[1] - tokens[0])
    response_s = (short - prefill_token_s * tokens[0] - iteration_s[-1][1]) / most
    cache = (
        None
        if cfg.engine.kv_cache_bytes is None
        else cfg.engine.kv_cache_bytes // memory.kv_bytes_per_token(model.load_hf_config(cfg.model), cfg.engine)
    )
    return EngineProfile(iteration_s, kv_token_s, prefill_token_s, max(response_s, 0.0), block, cache)


def block_tokens(cfg: config.Config, *, cuda: bool) -> int:
    return 0 if not cfg.engine.prefix_caching else cluster.BLOCK_TOKENS if cuda else CPU_BLOCK_TOKENS


def predicted_load_s(cfg: config.Config, profile: EngineProfile, draws: list[Draw]) -> float:
    one_step = dataclasses.replace(
        cfg, rollout=config.Rollout(prompts_per_step=len(draws), group_size=cfg.rollout.group_size)
    )
    return predict.run(one_step, Cluster(profile, TrainerProfile()), draws.__getitem__, num_steps=1, skip=0)[
        0
    ].rollout_s


def endless(source: str | Path, folder: str | Path) -> None:
    """A copy of the model in which vLLM finds no token that ends a response: not in its config, and without its
    generation_config."""
    for path in Path(source).iterdir():
        if path.name != "generation_config.json":
            shutil.copy(path, folder)
    shape = json.loads((Path(source) / "config.json").read_text()) | {"eos_token_id": None}
    (Path(folder) / "config.json").write_text(json.dumps(shape))


def run(cfg: config.Config, args: argparse.Namespace) -> dict:
    most = min(cfg.engine.max_running_responses, args.load)
    runnings = (
        sorted({min(int(n), most) for n in args.running.split(",")})
        if args.running
        else [n for n in (1 << i for i in range(20)) if n <= most]
    )
    (_, p1), (_, l1) = sizes(cfg)
    lengths = LogNormal(l1 / 4, 1.4 * l1 / 4, l1, p1, 1, seed=cfg.seed)
    G = cfg.rollout.group_size
    draws = [Draw(p1, lengths(i).response_tokens * G) for i in range(cfg.engine.num_engines * args.load // G)]
    seconds: dict[str, list[float]] = {}
    cuda = topology.pick_device(cfg.device).type == "cuda"
    with tempfile.TemporaryDirectory() as run_dir:
        engines = Engines(
            dataclasses.replace(cfg, run_dir=run_dir), cfg.model, cuda=cuda, stop_token_ids=[], alone=True
        )
        try:
            engines.wait_until_ready()
            todo = works(Bench(cfg, engines), runnings, draws)
            for round_ in range(-1, args.rounds):  # the first one warms up
                for name, work in todo.items():
                    s = work()
                    if round_ >= 0:
                        seconds.setdefault(name, []).append(s)
                print(
                    f"round {round_ + 1} of {args.rounds}: load average {os.getloadavg()[0]:.1f}",
                    file=sys.stderr,
                    flush=True,
                )
        finally:
            engines.stop()
    median = {name: statistics.median(s) for name, s in seconds.items()}
    profile = profile_of(cfg, median, runnings, block_tokens(cfg, cuda=cuda))
    tokens = sum(n for d in draws for n in d.response_tokens)
    predicted = predicted_load_s(cfg, profile, draws)
    return {
        "load_average": os.getloadavg()[0],
        "engines": cfg.engine.num_engines,
        "profile": dataclasses.asdict(profile),
        # of all engines, with an empty cache
        "tokens_per_s": {n: n * cfg.engine.num_engines / s for n, s in profile.iteration_s},
        "prefix_cache": {
            "siblings_s": median[f"prompts of {p1}"],
            "no_siblings_s": median["no siblings"],
            "running": runnings[-1],
            "prompt_tokens": p1,
        },
        "load": {
            "responses": len(draws) * G,
            "response_tokens": tokens,
            "s": median["load"],
            "tokens_per_s": tokens / median["load"],
            "simulated_s": predicted,
            "simulated_over_measured": predicted / median["load"],
        },
        "seconds": seconds,
    }


def main() -> None:
    parser = measure.parser(__doc__, "rollout.json")
    parser.add_argument("--cfg", required=True)
    parser.add_argument("--running", help="comma-separated (1, 2, 4 ... up to engine.max_running_responses, or --load)")
    parser.add_argument("--load", type=int, default=128, help="responses per engine (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_intermixed_args()
    cfg = config_file.load(args.cfg, args.overrides)
    with tempfile.TemporaryDirectory() as made, tempfile.TemporaryDirectory() as folder:
        if cfg.warm_start is not None and not Path(cfg.model).is_dir():
            arithmetic.make_model(made, cfg.seed)
            cfg = dataclasses.replace(cfg, model=made)
        endless(local_folder(cfg.model), folder)
        about = measure.about(__doc__) | {"rounds": args.rounds}
        result = about | run(dataclasses.replace(cfg, model=folder), args)
    measure.write(args.out, result)
    for n, s in result["profile"]["iteration_s"]:
        print(f"{n:5} running: {s * 1e3:8.2f} ms an iteration, {result['tokens_per_s'][n]:9.0f} tokens/s")
    print(
        json.dumps(
            {k: v for k, v in result["profile"].items() if k != "iteration_s"}
            | {"prefix_cache": result["prefix_cache"], "load": result["load"]},
            indent=1,
        )
    )
    print(f"written to {args.out}", flush=True)


if __name__ == "__main__":
    entry.run(main)
