"""Whole runs with sessions of several turns: real engines, agents in processes of their own.

Not covered here: tool calls (test_environments.py), which the tiny model does not write.
"""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from grpo_mcore.report import run_folder
from tests.conftest import CONFIG
from tests.dist import environment, program
from tests.test_trainer import check_names, command, processes_with, rows, train, wait_until

pytestmark = pytest.mark.slow

FILE = Path(__file__).with_name("environments_of_mine.py")


@pytest.fixture
def cfg(tmp_path, taught) -> Path:
    """The model that is taught, with a chat template that leaves the texts as they are."""
    shutil.copytree(taught, tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    text = CONFIG.format(model=tmp_path / "model", run_dir=tmp_path / "run")
    for old, new in (
        ("chat_template: false", "chat_template: true"),
        ("max_response_tokens: 40", "max_response_tokens: 110"),
        ("warm_start: {task: two_digit_sums, stop_at_pass_rate: 0.25}", ""),
        ("num_steps: 4", "num_steps: 2"),
    ):
        assert old in text
        text = text.replace(old, new)
    text += f"environment: {{path: '{FILE}:three_turns'}}\n"
    text += (
        f"reward: {{functions: [{{path: environment}}, {{path: '{FILE.parent}/functions.py:last', weight: 0.5}}]}}\n"
    )
    path = tmp_path / "cfg.yaml"
    path.write_text(text.replace("eval: {", "eval: {reward: environment, "))
    return path


def sampled(run_dir: Path) -> list[dict]:
    return [
        row
        for path in sorted((run_dir / "rollouts").glob("step_*.jsonl"))
        for row in map(json.loads, path.read_text().splitlines())
    ]


def test_sessions_are_trained_on_as_single_turns_are(cfg, tmp_path):
    run_dir = tmp_path / "run"
    train(cfg)
    check_names(cfg, run_dir)
    steps = [row for row in run_folder.read_metrics(run_dir) if not run_folder.is_evaluation(row)]
    for row in steps:
        assert row["mismatch/logprob_abs_max"] < 1e-4  # float32 on both sides, over given and sampled tokens
        assert row["environment/turns_mean"] > 2 and row["environment/given_tokens_mean"] >= 6
        assert (row["environment/failed"], row["environment/timed_out"]) == (0, 0)
    found = sampled(run_dir)
    assert {row["session"]["num_turns"] for row in found} & {3}
    assert {row["prompt_tokens"] for row in found} == {7}  # 6 of the group's, and one more
    full = next(row for row in found if "turns" in row and row["session"]["num_turns"] == 3)
    assert [who for who, _ in full["turns"]] == ["sampled", "given"] * 2 + ["sampled"]
    assert [text for who, text in full["turns"] if who == "given"] == ["12+34=", "5+6="]
    environment, last = full["rewards"]
    assert environment["value"] > 0 and environment["extra"]["first"] == full["turns"][0][1]
    assert full["reward"] == pytest.approx(environment["value"] + 0.5 * last["value"])

    out = tmp_path / "out.json"
    done = program("launch/evaluate.py", "--cfg", cfg, "--out", out, cwd=tmp_path, timeout_s=240)
    assert done.returncode == 0, done.stdout[-4000:]
    seen, evaluated = json.loads(out.read_text()), run_folder.read_metrics(run_dir)[-1]
    assert {k: v for k, v in seen.items() if k.startswith("eval/")} == {
        k: v for k, v in evaluated.items() if k != "step"
    }


def test_an_engine_that_is_killed_between_turns_changes_nothing(cfg, tmp_path):
    overrides = ("engine.num_engines=2", "eval.data=null", f"environment.path={FILE}:three_turns_slowly")
    train(cfg, *overrides, f"run_dir={tmp_path / 'undisturbed'}")
    log, between = tmp_path / "disturbed.log", tmp_path / "between"
    process = subprocess.Popen(
        command(cfg, *overrides),
        cwd=tmp_path,
        env=environment(TEST_MARKER="turns", TEST_BETWEEN=str(between)),
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
    )
    try:
        wait_until(lambda: between.exists() or process.poll() is not None, 180, log.read_text)
        engine = next(int(p.split()[0]) for p in processes_with("TEST_MARKER=turns") if "ray::Engine" in p)
        os.kill(engine, signal.SIGKILL)
        assert process.wait(200) == 0, log.read_text()[-3000:]
    finally:
        process.kill()
    assert "failed" in log.read_text() and "a replacement is started" in log.read_text()
    seen = [
        [
            {k: v for k, v in row.items() if k not in ("rollout/engine_failures", "refit/engines")}
            for row in rows(run_dir)
        ]
        for run_dir in (tmp_path / "run", tmp_path / "undisturbed")
    ]
    assert seen[0] == seen[1]
    assert sampled(tmp_path / "run") == sampled(tmp_path / "undisturbed")


def test_agents_that_fail_cost_their_own_responses(cfg, tmp_path):
    overrides = (f"environment.path={FILE}:one_of_many", "environment.wall_s=2", "num_steps=1", "eval.data=null")
    train(cfg, *overrides, "batch.max_tokens_per_microbatch=256")
    found = sampled(tmp_path / "run")
    said = {(row["session"]["status"], row["session"]["detail"]) for row in found}
    assert len(found) == 16 and said == {
        ("failed", "refused: message 0 is not what was recorded: the past of a session cannot be rewritten"),
        ("failed", "KeyError: 'no such thing'"),
        ("not_applicable", ""),
        ("not_applicable", "no token is left for another turn"),
        ("timed_out", "stopped after wall_s = 2 s of clock time"),
    }
    assert all(row["response_tokens"] >= 1 and row["session"]["num_turns"] >= 1 for row in found)
