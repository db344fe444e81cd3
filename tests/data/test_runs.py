"""Whole runs on a mixture: rows of verl and of GSM8K as they stand, chats, prompts left out, two evaluation sets.

Not covered here: what the keys mean (the other files of this folder).
"""

import json
import shutil
import signal
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from grpo_mcore.checkpoint import checkpoint
from grpo_mcore.data import arithmetic
from tests.conftest import CONFIG
from tests.data.test_sources import jsonl
from tests.dist import program
from tests.test_trainer import check_names, rows, start_and_stop, train

pytestmark = pytest.mark.slow

DATA = """
data:
  train:
  - {{path: {folder}/rows.parquet, format: verl, weight: 3, name: verl}}
  - {{path: {folder}/gsm8k.jsonl, format: gsm8k}}
  prompt_template: "{{problem}}="
  max_pass_rate: 0.75
  max_prompt_tokens: 8
"""


@pytest.fixture
def cfg(tmp_path, taught) -> Path:
    """The model that is taught, with a chat template that leaves the texts as they are."""
    shutil.copytree(taught, tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    made = arithmetic.rows("two_digit_sums/train")
    verl = [
        {
            "data_source": "sums",
            "prompt": [{"role": "user", "content": problem}],
            "reward_model": {"style": "rule", "ground_truth": answer},
            "extra_info": {"index": i},
        }
        for i, (problem, answer) in enumerate(made[:24])
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(verl), tmp_path / "rows.parquet")
    jsonl(tmp_path / "gsm8k.jsonl", *({"question": p, "answer": f"so\n#### {a}"} for p, a in made[24:32]))
    text = CONFIG.format(model=tmp_path / "model", run_dir=tmp_path / "run")
    lines, inside = [], False
    for line in text.splitlines(keepends=True):  # its data section is ours
        inside = line.startswith("data:") or (inside and line[0] in " -")
        lines += [] if inside or "warm_start" in line else [line]
    path = tmp_path / "cfg.yaml"
    path.write_text("".join(lines) + DATA.format(folder=tmp_path))
    return path


def drawn(run_dir: Path) -> list[tuple]:
    return [
        (row["position"], row["source"], row["prompt_id"], row["reward"])
        for path in sorted((run_dir / "rollouts").glob("step_*.jsonl"))
        for row in map(json.loads, path.read_text().splitlines())
    ]


def test_a_mixture_killed_and_taken_up_again_draws_what_the_undisturbed_run_draws(cfg, tmp_path):
    sets = (
        "eval.data=[{path: 'arithmetic:two_digit_sums/heldout'}, {path: 'arithmetic:two_digit_sums/train', limit: 8}]"
    )
    whole, killed = tmp_path / "run", tmp_path / "killed"
    train(cfg, sets)
    expected = rows(whole)
    names = [name for row in expected for name in row]
    assert "reward/mean/verl" in names and "reward/mean/gsm8k" in names
    assert any(name.startswith("eval/arithmetic_two_digit_sums_heldout/mean@") for name in names)
    check_names(cfg, whole, sets)
    assert expected[-2]["rollout/prompts_left_out"] > 0
    by_source = [source for _, source, _, _ in drawn(whole)]
    assert by_source.count("verl") > 1.5 * by_source.count("gsm8k")

    # The last evaluation again, by itself: the same samples, compared problem by problem.
    for name, more in (("before", []), ("after", ["--compare", str(tmp_path / "before.json")])):
        out = str(tmp_path / f"{name}.json")
        done = program("launch/evaluate.py", "--cfg", str(cfg), "--out", out, *more, sets, cwd=tmp_path, timeout_s=240)
        assert done.returncode == 0, done.stdout[-4000:]
    seen = json.loads((tmp_path / "after.json").read_text())
    assert {name: seen[name] for name in seen if name.startswith("eval/")} == {
        name: value for name, value in expected[-1].items() if name != "step"
    }
    assert {p["source"] for p in seen["problems"]} == {
        "arithmetic_two_digit_sums_heldout",
        "arithmetic_two_digit_sums_train",
    }
    assert seen["comparison"]["difference"]["value"] == 0 and seen["comparison"]["protocols_differ_in"] == []

    overrides = (sets, f"run_dir={killed}", "checkpoint.every=1")
    start_and_stop(cfg, "killed", lambda: len(checkpoint.published(killed)) >= 1, signal.SIGKILL, *overrides)
    for late in checkpoint.published(killed)[:-1]:
        shutil.rmtree(late)
    assert "going on from step" in train(cfg, *overrides)
    assert drawn(killed) == drawn(whole)
    assert rows(killed) == expected
