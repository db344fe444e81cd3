"""Sampling ahead of training, dynamic sampling and engines that die, in whole runs with real engines, and Staleness 0
against a plain loop.

Not covered here: which decisions are right (test_dispatch.py, test_admission.py); one engine's failures in detail
(test_engines.py).
"""

import dataclasses
import functools
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from grpo_mcore import trainer
from grpo_mcore.config import file as config_file
from grpo_mcore.data.prompts import Stream, load
from grpo_mcore.loss import advantage, loss
from grpo_mcore.report import run_folder
from grpo_mcore.rollout.engine import Sampling
from grpo_mcore.rollout.rollout import grade, group_of, seed_of
from grpo_mcore.run import open_run
from tests.conftest import CONFIG
from tests.dist import environment
from tests.test_trainer import command, processes_with, start_and_stop, steps_done, train, wait_until

pytestmark = pytest.mark.slow  # whole runs


@pytest.fixture
def cfg(tmp_path, taught) -> Path:
    path = tmp_path / "cfg.yaml"
    path.write_text(
        CONFIG.format(model=taught, run_dir=tmp_path / "run").replace(
            "every: 2, max_prompts", "every: 100, max_prompts"
        )
    )
    return path


def rollouts(run_dir: Path) -> list[list[dict]]:
    """The responses of each step."""
    return [
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted((run_dir / "rollouts").glob("step_*.jsonl"))
    ]


def identities(run_dir: Path) -> list[tuple[int, int]]:
    return [(r["position"], r["sample"]) for step in rollouts(run_dir) for r in step]


def every(num_prompts: int, start: int = 0) -> list[tuple[int, int]]:
    return [(p, g) for p in range(start, num_prompts) for g in range(4)]


def sampled_plainly(run, step: int) -> tuple[list, list]:
    """(groups, rewards_PG) of a synchronous step, as a loop of a few lines."""
    cfg = run.cfg
    stream = Stream(load(cfg.data.train, cfg.data, run.tokenizer, "data.train")[0], cfg.seed)
    groups = []
    for position in range(step * cfg.rollout.prompts_per_step, (step + 1) * cfg.rollout.prompts_per_step):
        prompt = stream.at(position)
        sampling = Sampling(
            cfg.rollout.group_size,
            cfg.rollout.temperature,
            cfg.rollout.max_response_tokens,
            seed_of(cfg.seed, "rollout", position, prompt),
        )
        groups.append(
            group_of(
                prompt,
                run.driver.engines.submit((position,), prompt.token_ids, sampling, "plain").result(60),
                oldest=step,
                newest=step,
            )
        )
    graded = grade(groups, range(len(groups)), run.tokenizer, run.driver.rewards)
    return groups, [g.rewards for g in graded]


def test_staleness_0_is_the_synchronous_run_bit_for_bit(cfg, tmp_path):
    def run_of(name: str):
        return open_run(
            config_file.load(
                cfg,
                [
                    f"run_dir={tmp_path / name}",
                    "num_steps=3",
                    "eval.data=null",
                    "checkpoint.every=0",
                    "optimizer.lr=1e-4",
                ],
            )
        )

    with run_of("ours") as run:
        trainer.train(run)
        ours = {name: p.clone() for name, p in run.policy.chunks[0].named_parameters()}
    with run_of("plain") as run:
        for step in range(3):
            run.refit(version=step)
            groups, rewards_PG = sampled_plainly(run, step)
            advantages_PG = advantage.group_advantages(
                torch.tensor(rewards_PG), **dataclasses.asdict(run.cfg.advantage)
            )
            batches = trainer.assemble(run, groups, advantages_PG)
            trainer.score(run, batches)
            for b in batches:
                run.policy.update(b, functools.partial(loss.grpo, cfg=run.cfg.loss), lr=run.cfg.optimizer.lr)
        plain = dict(run.policy.chunks[0].named_parameters())
        assert ours.keys() == plain.keys() and all(torch.equal(ours[name], plain[name]) for name in ours)
    assert [sum(r["reward"] for r in step) for step in rollouts(tmp_path / "ours")][-1] == sum(map(sum, rewards_PG)) > 0


def test_sampling_runs_ahead_by_one_step_and_what_was_killed_goes_on_where_training_was(cfg, tmp_path):
    run_dir = tmp_path / "run"
    ahead = ["rollout.max_staleness=1"]
    start_and_stop(cfg, "ahead", lambda: steps_done(run_dir) >= 3, signal.SIGKILL, *ahead)
    train(cfg, "num_steps=8", *ahead)
    assert identities(run_dir) == every(8 * 4)  # in the order of the stream; nothing twice, nothing skipped
    for step, responses in enumerate(rollouts(run_dir)):
        versions = {v for r in responses for v, _ in r["versions"]}
        assert versions <= {step - 1, step} and all(
            sum(n for _, n in r["versions"]) == r["response_tokens"] for r in responses
        )
    rows = [r for r in run_folder.read_metrics(run_dir) if "reward/mean" in r]
    assert max(r["rollout/staleness_max"] for r in rows) == 1 and sum(r["rollout/staleness_mean"] for r in rows) > 2


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_an_engine_that_dies_or_hangs_while_sampling_runs_ahead_loses_nothing(cfg, tmp_path, how):
    log = tmp_path / "disturbed.log"
    overrides = ["rollout.max_staleness=1", "engine.num_engines=2", "engine.health_timeout_s=5", "num_steps=10"]
    process = subprocess.Popen(
        command(cfg, *overrides),
        cwd=tmp_path,
        env=environment(TEST_MARKER="ahead2"),
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
    )
    try:
        wait_until(lambda: steps_done(tmp_path / "run") >= 2 or process.poll() is not None, 180, log.read_text)
        engine = int(next(p.split()[0] for p in processes_with("TEST_MARKER=ahead2") if "ray::Engine" in p))
        os.kill(engine, how)
        assert process.wait(200) == 0, log.read_text()[-3000:]
    finally:
        process.kill()
    assert "failed" in log.read_text() and "a replacement is started" in log.read_text()
    assert identities(tmp_path / "run") == every(10 * 4)


def test_groups_without_variance_are_replaced_by_other_prompts_and_counted(cfg, tmp_path):
    train(cfg, "num_steps=6", "rollout.dynamic_sampling=true", "rollout.max_draws=3", "rollout.oversampling_frac=0.5")
    rows = [r for r in run_folder.read_metrics(tmp_path / "run") if "reward/mean" in r]
    cursor = 0
    for row, step in zip(rows, rollouts(tmp_path / "run"), strict=True):
        positions = sorted({r["position"] for r in step})
        flat = [p for p in positions if len({r["reward"] for r in step if r["position"] == p}) == 1]
        assert len(positions) == 4 and len(flat) == row["rollout/groups_without_variance"]
        drawn = 4 + row["rollout/groups_passed_over"]
        assert drawn <= 12 and (not flat or drawn == 12)
        assert cursor <= positions[0] and positions[-1] < cursor + drawn
        cursor += int(drawn)
        assert row["rollout/staleness_max"] == 0
    assert sum(r["rollout/groups_passed_over"] for r in rows) > 0
