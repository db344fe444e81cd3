"""Whole runs with reward functions of the user's own: training, evaluation and --check, with real engines.

Not covered here: styles and limits (test_functions.py).
"""

import json
from pathlib import Path

import pytest

from grpo_mcore.report import run_folder
from tests.conftest import CONFIG
from tests.dist import program
from tests.test_trainer import check_names, train

pytestmark = pytest.mark.slow

FILE = Path(__file__).with_name("functions_of_each_style.py")
STYLES = {
    "compute_score": "verl",
    "accuracy_reward": "trl",
    "plain": "plain",
    "plain_async": "plain",
    "of_group": "group",
}


@pytest.fixture
def cfg(tmp_path, taught) -> Path:
    functions = [{"path": f"{FILE}:{name}"} for name in STYLES]
    functions[-1]["style"] = "group"
    functions.append({"path": f"{FILE}:sleeps_at_work", "weight": 0.0, "cpu_s": 0.5, "wall_s": 0.5})
    path = tmp_path / "cfg.yaml"
    path.write_text(
        CONFIG.format(model=taught, run_dir=tmp_path / "run").replace("num_steps: 4", "num_steps: 2")
        + f"reward: {{num_processes: 1, functions: {json.dumps(functions)}}}\n"
    )
    path.write_text(path.read_text().replace("eval: {", "eval: {reward: plain, "))
    return path


def test_the_same_function_in_each_style_says_the_same_and_one_that_hangs_does_not_hold_up_the_run(cfg, tmp_path):
    run_dir = tmp_path / "run"
    done = program("launch/train.py", "--cfg", cfg, "--check", cwd=tmp_path, timeout_s=120)
    assert done.returncode == 0, done.stdout[-4000:]
    for name, style in STYLES.items():
        assert f"1 x {name} ({style})" in done.stdout

    said = train(cfg)
    assert said.count("warning: reward function sleeps_at_work: killed after wall_s = 0.5 s") == 1
    parts = [
        {part["name"]: part for part in row["rewards"]}
        for path in sorted((run_dir / "rollouts").glob("step_*.jsonl"))
        for row in map(json.loads, path.read_text().splitlines())
    ]
    assert len(parts) == 2 * 16 and {p["plain"]["value"] for p in parts} == {0.0, 1.0}
    for p in parts:
        assert {p[name]["value"] for name in STYLES} == {p["plain"]["value"]}
        assert p["sleeps_at_work"]["value"] is None
        assert p["sleeps_at_work"]["status"] in ("timed_out", "failed")
    check_names(cfg, run_dir)
    steps = [row for row in run_folder.read_metrics(run_dir) if not run_folder.is_evaluation(row)]
    assert all(row["reward/mean"] == pytest.approx(5 * row["reward/plain/mean"]) for row in steps)
    assert all(
        row["reward/sleeps_at_work/timed_out"] + row["reward/sleeps_at_work/failed"] == 16 and row["reward/scored"] == 0
        for row in steps
    )

    out = tmp_path / "out.json"
    done = program("launch/evaluate.py", "--cfg", cfg, "--out", out, cwd=tmp_path, timeout_s=240)
    assert done.returncode == 0, done.stdout[-4000:]
    seen, last = json.loads(out.read_text()), run_folder.read_metrics(run_dir)[-1]
    assert {k: v for k, v in seen.items() if k.startswith("eval/")} == {k: v for k, v in last.items() if k != "step"}
    assert 0 <= seen["eval/mean@2"] <= 1 and "eval/maj@2" not in seen
