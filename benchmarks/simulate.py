"""A real run, and what the simulator makes of it: its engines are profiled between its steps, so that other work on the
machine, which comes and goes, weighs on both alike.

    python benchmarks/simulate.py --cfg configs/quickstart.yaml num_steps=20
    python benchmarks/simulate.py --cfg configs/smollm2.yaml --running 1,8,32 \
        --out benchmarks/results/simulate_smollm2.json num_steps=6 engine.num_engines=2 engine.num_threads=1

Definitions:
    run           launch/train.py's, with rollout.max_staleness = 0, without evaluation and checkpoints; its first step
                  warms up and does not count
    profile       benchmarks/rollout.py's, from one round of its work before each counted step's sampling, outside of
                  the run's clocks; means over rounds, as means over steps are predicted
    measured, predicted  mean seconds of a step, by phase: rollout (the wait for the groups) is predicted from the
                  profile and the lengths that were sampled; train and refit are the run's own (predictions for another
                  batch, cluster or staleness start from these)
"""

from grpo_mcore import entry  # noqa: I001  first: what it sets in the environment must be there before torch is imported

import dataclasses
import os
import statistics
import sys
import tempfile
from pathlib import Path

import ray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where only the package is installed

from benchmarks import measure, rollout as benchmark
from grpo_mcore import trainer
from grpo_mcore.config import file as config_file
from grpo_mcore.plan import cluster, predict
from grpo_mcore.plan.cluster import Cluster, Measured
from grpo_mcore.policy import warm_start
from grpo_mcore.policy.model_folder import local_folder
from grpo_mcore.run import Run, open_run


class Profiled:
    """A Rollout, with a round of the benchmark before each step."""

    def __init__(self, run: Run, runnings: list[int]):
        self._run, self._rollout = run, run.driver.rollout
        works = benchmark.works(benchmark.Bench(run.cfg, run.driver.engines), runnings, [])
        self._works = {name: work for name, work in works.items() if name != "load"}
        self.seconds: dict[str, list[float]] = {name: [] for name in self._works}
        self.load_averages: list[float] = []

    def begin(self, version: int) -> None:
        self._stop_at([])
        for name, work in self._works.items():
            s = work()
            if version:
                self.seconds[name].append(s)
        self._stop_at(self._run.tokenizer.stop_token_ids)
        self.load_averages.append(os.getloadavg()[0])
        self._rollout.begin(version)

    def take(self):
        return self._rollout.take()

    def _stop_at(self, token_ids: list[int]) -> None:
        ray.get([slot.actor.ready.remote(token_ids, False) for slot in self._run.driver.engines.ready])


def main() -> None:
    parser = measure.parser(__doc__, "simulate.json")
    parser.add_argument("--cfg", required=True)
    parser.add_argument(
        "--running",
        default="1,2,4,8,16,32,64,128",
        help="responses of one engine at once, at which it is profiled (%(default)s)",
    )
    parser.add_argument("--run-dir", help="keeps the run there")
    args = parser.parse_intermixed_args()
    runnings, about = [int(n) for n in args.running.split(",")], measure.about(__doc__)
    with tempfile.TemporaryDirectory() as temporary:
        run_dir, folder = args.run_dir or temporary + "/run", Path(temporary) / "model"
        cfg = config_file.load(
            args.cfg,
            [*args.overrides, f"run_dir={run_dir}", "checkpoint.every=0", "eval.data=null", "rollout.max_staleness=0"],
        )
        if cfg.warm_start is not None:
            warm_start.ensure(cfg)
        folder.mkdir()
        benchmark.endless(local_folder(cfg.model), folder)
        cfg = dataclasses.replace(cfg, model=str(folder), warm_start=None)
        with open_run(cfg) as run:
            cuda, profiled = run.topology.device.type == "cuda", Profiled(run, runnings)
            run.driver.rollout = profiled
            trainer.train(run)
        mean = {name: statistics.mean(s) for name, s in profiled.seconds.items()}
        profile = benchmark.profile_of(cfg, mean, runnings, benchmark.block_tokens(cfg, cuda=cuda))
        measured = cluster.measured_steps(run_dir)
        parts = Cluster(profile, cluster.trainer_of(measured[1:]))
        predicted = predict.run(cfg, parts, Measured(run_dir), num_steps=len(measured) - 1, skip=1)
        summary = predict.summary(
            predicted, cfg.engine.num_engines, cfg.engine.max_running_responses, cfg.responses_per_step
        )
        result = about | {
            "load_averages": profiled.load_averages,
            "profile": dataclasses.asdict(profile),
            "trainer": dataclasses.asdict(parts.trainer),
            "predicted": {cfg.rollout.max_staleness: dataclasses.asdict(summary)},
            "measured": predict.comparison(measured[1:], predicted),
            "steps": [
                {"measured_rollout_s": m.rollout_s, "predicted_rollout_s": p.rollout_s}
                for m, p in zip(measured[1:], predicted, strict=True)
            ],
            "seconds": profiled.seconds,
        }
    measure.write(args.out, result)
    print(predict.table(result), f"written to {args.out}", sep="\n\n", flush=True)


if __name__ == "__main__":
    entry.run(main)
