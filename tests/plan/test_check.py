"""launch/train.py --check: the table, and that it finds what ends a run before it begins.

Not covered here: what each of the things looked at may have (tests of their rooms).
"""

import fcntl
import os

import pytest

from grpo_mcore.config import file as config_file
from grpo_mcore.config.config import InputError
from grpo_mcore.plan import check
from tests.dist import program
from tests.test_trainer import BAD_INPUT, ENDED_CHAT, untaught  # noqa: F401

NOT_OF_FILES = {"an unknown key", "a wrong type"}  # they end with the reading of the configuration


def table(cfg, *overrides: str, ranks: int = 1) -> InputError | None:
    loaded = config_file.load(cfg, overrides)
    try:
        check.main(loaded, ranks)
    except InputError as e:
        return e
    return None


def test_what_is_there_is_shown_and_nothing_is_written(untaught, tmp_path, capsys):  # noqa: F811
    before = sorted(tmp_path.rglob("*"))
    assert table(untaught, f"run_dir={tmp_path}/run") is None
    rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    said = {name.strip(): words.strip() for name, words in rows.items()}
    assert said["run_dir"] == f"{tmp_path}/run: a new run" and said["device"] == "cpu"
    assert said["model"].startswith("qwen2, 0.") and "GB free" in said["checkpoints"]
    assert said["data.train"].endswith("prompts, 0 over-long") and said["as before"] == "the same"
    assert not any("WRONG" in words for words in said.values())
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("case", [case for case in BAD_INPUT if case not in NOT_OF_FILES])
def test_what_would_end_a_run_before_it_begins_is_found(untaught, tmp_path, monkeypatch, capsys, case):  # noqa: F811
    (tmp_path / "rows.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n{"problem": "1+2"}\n')
    (tmp_path / "solutions.jsonl").write_text('{"problem": "1+1", "answer": "#### 2"}\n')
    (tmp_path / "chats.jsonl").write_text(ENDED_CHAT)
    monkeypatch.chdir(tmp_path)
    overrides, words = BAD_INPUT[case]
    assert str(table(untaught, *overrides)).startswith("--check = ")
    assert words in capsys.readouterr().out


def test_all_that_is_wrong_is_said_at_once_and_what_hangs_on_it_is_left_out(untaught, tmp_path):  # noqa: F811
    wrong = [
        "model=nowhere/model",
        "data.train=nowhere.jsonl",
        "checkpoint.best_metric=reward/maen",
        "checkpoint.keep_best=1",
    ]
    done = program("launch/train.py", "--cfg", untaught, "--check", f"run_dir={untaught}/run", *wrong)
    out = [line for line in done.stdout.splitlines() if "arn" not in line]
    assert done.returncode == 2 and "Traceback" not in done.stdout
    assert [line.split("  ")[0] for line in out if " WRONG: " in line] == ["configuration", "run_dir", "model", "rows"]
    assert any(line.startswith("tokenizer") and line.endswith("(not without model)") for line in out)
    errors = [line for line in out if line.startswith("error:")]
    assert len(errors) == 1 and "--check = 'configuration, run_dir, model, rows'" in errors[0]


def test_a_run_dir_in_use_and_a_disk_without_room_are_found(untaught, tmp_path, monkeypatch, capsys):  # noqa: F811
    (tmp_path / "run").mkdir()
    lock = os.open(tmp_path / "run/lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        assert table(untaught, f"run_dir={tmp_path}/run", "checkpoint.keep=900000", "num_steps=999999")
    finally:
        os.close(lock)
    out = capsys.readouterr().out
    assert "is in use by another process" in out and "holds checkpoints, 900001 of" in out
