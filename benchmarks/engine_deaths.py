"""Engines that are killed, stopped and sent wrong weights at random moments of one run: no response is lost, none is
graded twice, and weights and metrics are those of an undisturbed run.

    python benchmarks/engine_deaths.py --deaths 60

A small real run of launch/train.py's trainer (Megatron, vLLM, Ray; the quickstart's tiny model, two engines), first
undisturbed, then disturbed. A death is a signal to an engine that samples, waits or is being refitted: kill -9 or
SIGSTOP, of the actor's process or of vLLM's own. One comes within each step until there were as many as asked for; most
steps wait for both engines, so that some deaths leave none. One refit in four has a tensor that is half as large again
on its way. The seed makes kinds and moments, which the machine's speed then places.
"""

import collections
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where only the package is installed

from benchmarks import measure
from benchmarks.kill_resume import Run
from grpo_mcore.report import run_folder

OVERRIDES = [
    "rollout.prompts_per_step=32",
    "rollout.group_size=8",
    "batch.global_batch_size=128",
    "engine.max_running_responses=16",  # so that a step is sampled for some seconds
    "engine.num_engines=2",
    "engine.health_timeout_s=4",
    "engine.max_failures=1000000",
    "rollout.timeout_s=300",
    "refit.timeout_s=20",
]
DISTURB = "--disturb"  # what the program is called with that the disturbed run is
SIGNALS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}
CORRUPTED_FRAC, WAIT_FRAC, LATEST_S = 0.25, 0.75, 1.0


class Disturbed:
    """A run's refits, with what befalls engines from the start of each on. In the run's process."""

    def __init__(self, run, deaths: int, seed: int):
        self._honest, self._engines, self._rng = run.refit, run.driver.engines, random.Random(seed)
        self._left, self._corrupt = deaths, False
        self.deaths: list[dict] = []
        self.corrupted = 0
        self._export, run.policy.export = run.policy.export, self._exported
        self._blow: threading.Thread | None = None

    def __getattr__(self, name: str):
        return getattr(self._honest, name)

    def __call__(self, version: int):
        if self._rng.random() < WAIT_FRAC or self._left == 0:
            self._wait_for_all()
        self._corrupt = self._rng.random() < CORRUPTED_FRAC
        if self._left and (self._blow is None or not self._blow.is_alive()):
            self._left -= 1
            arguments = version, self._rng.choice(list(SIGNALS)), self._rng.random() < 0.5, self._rng.random()
            self._blow = threading.Thread(target=self._strike, args=arguments, daemon=True)
            self._blow.start()
        return self._honest(version)

    def _wait_for_all(self) -> None:
        import ray

        if starting := list(self._engines._starting):
            ray.wait(starting, num_returns=len(starting), timeout=300)

    def _strike(self, version: int, how: str, whole: bool, moment: float) -> None:
        time.sleep(moment * LATEST_S)
        while not (ready := self._engines.ready):
            time.sleep(0.05)
        slot = ready[int(moment * 1e6) % len(ready)]
        requests = len(self._engines._dispatch.dealt_to(slot))
        processes = slot.process_ids[:1] if whole else slot.process_ids[1:]  # the actor's; vLLM's own, its children
        for process_id in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process_id, SIGNALS[how])
        self.deaths.append(
            {"step": version, "engine": slot.index, "how": how, "of": "actor" if whole else "vllm", "dealt": requests}
        )

    def _exported(self, **how):
        for name, tensor in self._export(**how):
            if self._corrupt and name.endswith("mlp.down_proj.weight"):
                self._corrupt = False
                self.corrupted += 1
                tensor.mul_(1.5)
            yield name, tensor


def disturb(seed: int, deaths: int, seen: Path) -> None:
    """The run of the command line's configuration, disturbed. Writes to `seen` what it did and what was graded."""
    from grpo_mcore import entry, trainer
    from grpo_mcore.run import open_run, summarize

    cfg = entry.parse(__doc__).config
    trainer.make_model(cfg)
    with open_run(cfg) as run:
        assert run.driver is not None
        graded: collections.Counter = collections.Counter()
        honest = run.driver.rewards.grade

        def grade(cases):
            graded["responses"] += sum(len(case.texts) for case in cases)
            return honest(cases)

        run.driver.rewards.grade = grade  # type: ignore[method-assign]
        disturbed = run.refit = Disturbed(run, deaths, seed)  # type: ignore[assignment]
        trainer.train(run)
        summarize(run)
        seen.write_text(
            json.dumps(
                {
                    "deaths": disturbed.deaths,
                    "corrupted_refits": disturbed.corrupted,
                    "engine_failures": run.driver.engines.num_failures,
                    "graded_responses": graded["responses"],
                }
            )
        )


def finish_disturbed(run: Run, seen: Path, seed: int, deaths: int) -> dict:
    """What `disturb` wrote."""
    at = run.command.index(str(measure.ROOT / "launch/train.py"))
    run.command[at : at + 1] = [__file__, DISTURB, f"{seed},{deaths},{seen}"]
    run.finish()
    return json.loads(seen.read_text())


def rollouts(run: Run) -> dict[int, list[tuple]]:
    """By step: of each response what does not depend on the clock."""
    return {
        step: [(r["position"], r["sample"], r["response_tokens"], r["reward"], r["status"]) for r in rows]
        for step, path in run_folder.rollout_files(run.folder).items()
        for rows in [run_folder.read_rollouts(path)]
    }


def main() -> None:
    parser = measure.parser(__doc__, "engine_deaths.json")
    parser.add_argument("--deaths", type=int, default=60)
    parser.add_argument("--steps", type=int, help="default: one for each death, and two more")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_intermixed_args()
    steps, about, began = args.steps or args.deaths + 2, measure.about(__doc__), time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        overrides = [*OVERRIDES, f"model={scratch}/model", *args.overrides]
        whole, disturbed = (Run(Path(scratch) / name, steps, 1, overrides) for name in ("undisturbed", "disturbed"))
        whole.finish()
        print(f"undisturbed: {whole.steps()} steps, weights {whole.digest()[:16]}", flush=True)
        seen = finish_disturbed(disturbed, Path(scratch) / "seen.json", args.seed, args.deaths)
        sampled = rollouts(disturbed)
        responses = [(step, *row[:2]) for step, rows in sampled.items() for row in rows]
        expected = rollouts(whole)
        result = about | {
            "steps": steps,
            "seconds": round(time.monotonic() - began, 1),
            **seen,
            "responses": len(responses),
            "responses_lost": len({(s, *row[:2]) for s, rows in expected.items() for row in rows} - set(responses)),
            "responses_twice": len(responses) - len(set(responses)) + seen["graded_responses"] - len(responses),
            "rollouts_equal": sampled == expected,
            "weights_equal": disturbed.digest() == whole.digest(),
            "metrics_equal": compared(disturbed) == compared(whole),
        }
    measure.write(args.out, result)
    kinds = collections.Counter(f"{d['of']} {d['how']}" for d in result["deaths"])
    print(
        f"{len(result['deaths'])} deaths ({', '.join(f'{n} {kind}' for kind, n in sorted(kinds.items()))}) and "
        f"{result['corrupted_refits']} corrupted refits in {steps} steps; {result['responses']} responses, "
        f"{result['responses_lost']} lost, {result['responses_twice']} graded twice; weights "
        f"{'equal' if result['weights_equal'] else 'DIFFER'}, metrics "
        f"{'equal' if result['metrics_equal'] else 'DIFFER'}"
    )
    holds = all(result[f"{what}_equal"] for what in ("rollouts", "weights", "metrics"))
    raise SystemExit(not (holds and not result["responses_lost"] and not result["responses_twice"]))


def compared(run: Run) -> list[dict]:
    """Its metrics but for what says how often engines failed, and how many of them a refit reached."""
    return [
        {k: v for k, v in row.items() if k != "rollout/engine_failures" and not k.startswith("refit/")}
        for row in run.rows()
    ]


if __name__ == "__main__":
    if DISTURB in sys.argv:
        at = sys.argv.index(DISTURB)
        seed, deaths, seen = sys.argv[at + 1].split(",", 2)
        del sys.argv[at : at + 2]
        from grpo_mcore import entry

        entry.run(lambda: disturb(int(seed), int(deaths), Path(seen)))
    else:
        main()
