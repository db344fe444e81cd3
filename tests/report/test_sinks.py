"""Seconds by phase, and the files a Writer leaves.

Not covered here: the console's lines.
"""

import json
import math

import pytest

from grpo_mcore.report import run_folder
from grpo_mcore.report.sinks import Timer, Writer


def test_a_timer_adds_up_a_phases_passes_and_starts_anew_when_drained():
    shown = []
    timer = Timer(shown.append)
    for _ in range(2):
        with timer("rollout"):
            pass
    with pytest.raises(KeyError), timer("update"):
        raise KeyError
    drained = timer.drain()
    assert set(drained) == {"time/rollout_s", "time/update_s"}  # also of a phase that failed
    assert shown == ["rollout", "rollout", "update"]
    assert timer.drain() == {}


def writer(run_dir, start: int) -> Writer:
    return Writer(run_dir, start=start, num_steps=10)


def fill(run_dir) -> None:
    """Evaluations at 0, 2 and 4; steps 1 to 4: as the trainer writes them."""
    w = writer(run_dir, 0)
    w.write(0, {"eval/mean@4": 0.1})
    for step in range(1, 5):
        w.write(step, {"reward/mean": step / 8})
        if step % 2 == 0:
            w.write(step, {"eval/mean@4": step / 4})
    w.close()


def test_resuming_drops_later_rows_and_the_evaluation_of_its_step_and_keeps_the_rest(tmp_path):
    fill(tmp_path)
    w = writer(tmp_path, 2)
    # Going on from step 2: its training row is done; its evaluation is done anew, first of all.
    kept = [{"step": 0, "eval/mean@4": 0.1}, {"step": 1, "reward/mean": 0.125}, {"step": 2, "reward/mean": 0.25}]
    assert run_folder.read_metrics(tmp_path) == kept
    w.write(2, {"eval/mean@4": 0.75})
    w.close()
    assert run_folder.read_metrics(tmp_path) == [*kept, {"step": 2, "eval/mean@4": 0.75}]


def test_a_fresh_start_keeps_no_row_of_an_earlier_run(tmp_path):
    fill(tmp_path)
    writer(tmp_path, 0).close()
    assert run_folder.read_metrics(tmp_path) == []


def test_a_half_written_last_line_is_dropped(tmp_path):
    fill(tmp_path)
    path = tmp_path / "metrics.jsonl"
    whole = run_folder.read_metrics(tmp_path)
    for half in ('{"step": 5, "rew', '{"step": 5, "reward/mean": 0.5}'):  # the second lacks only its line's end
        path.write_text("".join(json.dumps(row) + "\n" for row in whole) + half)
        assert run_folder.read_metrics(tmp_path) == whole
    writer(tmp_path, 4).close()
    assert path.read_text().endswith("}\n")  # the next row starts on a line of its own


def test_a_nan_is_said_and_none_of_a_metrics_numbers(tmp_path, capsys):
    w = writer(tmp_path, 0)
    w.write(1, {"reward/mean": 0.5, "update/loss": math.nan, "update/entropy": math.nan})
    w.write(2, {"reward/mean": 0.75, "update/loss": 0.25})
    w.close()
    assert capsys.readouterr().out == "warning: after 1 steps NaN is the value of update/loss, update/entropy\n"
    rows = run_folder.read_metrics(tmp_path)
    assert run_folder.numbers(rows, "update/loss") == [0.25] and run_folder.numbers(rows, "reward/mean") == [0.5, 0.75]


def test_a_run_without_a_file_has_no_rows(tmp_path):
    assert run_folder.read_metrics(tmp_path) == []


def test_tensorboard_gets_every_number_at_its_step(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fill(tmp_path)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("reward/mean")] == [(1, 0.125), (2, 0.25), (3, 0.375), (4, 0.5)]
    assert [e.step for e in board.Scalars("eval/mean@4")] == [0, 2, 4]
