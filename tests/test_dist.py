"""What starts the ranks of other tests: whatever happens to a rank, the test fails with its words, and nothing is left.

Not covered here: that a forked process is as clean as a new one (the tests that use it show it).
"""

import os
import subprocess
import time

import pytest

from tests.dist import spawn


def rank() -> str:
    return os.environ["RANK"]


def leaves_without_a_result() -> None:
    print("words of mine", flush=True)
    os._exit(0)


def hangs(pid_file: str) -> None:
    with open(pid_file, "w") as f:
        f.write(str(subprocess.Popen(["sleep", "600"]).pid))
    print("here I hang", flush=True)
    time.sleep(600)


def one_fails() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("rank one is wrong")
    time.sleep(600)


def test_results_come_in_the_order_of_ranks():
    assert spawn(rank, 2) == ["0", "1"]


def test_a_rank_that_leaves_without_a_result_fails_the_test_with_its_words():
    with pytest.raises(AssertionError, match="(?s)rank 0 ended with 0, without a result.*words of mine"):
        spawn(leaves_without_a_result, 1)


def test_a_rank_that_hangs_is_ended_with_all_that_it_started(tmp_path):
    with pytest.raises(AssertionError, match="(?s)within 5 s.*rank 0 did not end.*here I hang"):
        spawn(hangs, 1, str(tmp_path / "pid"), timeout_s=5)
    with pytest.raises(ProcessLookupError):
        for _ in range(100):  # until it is reaped
            os.kill(int((tmp_path / "pid").read_text()), 0)
            time.sleep(0.1)


def test_ranks_that_wait_for_one_that_failed_are_ended_soon():
    start = time.monotonic()
    with pytest.raises(AssertionError, match="(?s)rank 0 did not end.*rank 1 ended with 1.*rank one is wrong"):
        spawn(one_fails, 2)
    assert time.monotonic() - start < 120  # of 240
