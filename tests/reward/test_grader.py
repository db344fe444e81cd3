r"""Grading in processes that can be killed: the verdicts, the limits, and what is left behind.

Nothing is replaced by a stand-in: the processes are the real ones, and the answers that hang math-verify do hang it.
What is a right answer is test_math_answer.py's matter. Not covered: a comparison that ends in a crash of the
interpreter (the same path as a kill from outside, which is covered).
"""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import psutil
import pytest

from grpo_mcore.config.config import Reward
from grpo_mcore.reward import killable
from grpo_mcore.reward.grader import Grader, Status, Verdict, counts
from tests.dist import ROOT

# A wide clock: other processes may keep the cores busy.
CFG = Reward(num_processes=1, cpu_s=0.5, wall_s=30.0, memory_bytes=1 << 30)
TWO = replace(CFG, num_processes=2)
HANGS = ["9^{9^{9^9}}", r"\Gamma(10^9)", "10^{10^9}", r"\binom{10^9}{10^8}", r"\sum_{k=1}^{10^9} k!"]


def boxed(answer: str) -> str:
    return rf"<think>perhaps \boxed{{0}}</think> It is \boxed{{{answer}}}."


def children() -> dict[int, str]:
    """Process id -> status of this process's grading processes; one that was not reaped is a zombie."""
    found = {}
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            status = child.status()
            if status == psutil.STATUS_ZOMBIE or "grpo_mcore.reward.grading_process" in child.cmdline():
                found[child.pid] = status
    return found


def wait_until(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def is_gone(pid: int) -> bool:
    """Ended; whoever inherits an orphan may be slow to reap it."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_each_kind_of_response_gets_its_reward_and_status():
    cases = [
        (boxed("12"), "12", False, 1.0, Status.CORRECT, "12"),
        (boxed(r"\frac{3}{4}"), "0.75", False, 1.0, Status.CORRECT, r"\frac{3}{4}"),  # takes algebra
        (boxed("12"), "13", False, 0.0, Status.WRONG, "12"),
        (boxed("x+2"), "1+x", False, 0.0, Status.WRONG, "x+2"),  # takes algebra
        (r"\boxed{12}</think> It is 12.", "12", False, 0.0, Status.NO_ANSWER, None),
        (boxed(""), "12", False, 0.0, Status.NO_ANSWER, None),
        (boxed("1" * 600), "1" * 600, False, 0.0, Status.NO_ANSWER, None),
        ("So x is", "12", True, 0.0, Status.TRUNCATED, None),
        (boxed("12") + " But wait, if", "12", True, 1.0, Status.CORRECT, "12"),  # truncated with its answer given
        (boxed("12") + " But wait, if", "13", True, 0.0, Status.WRONG, "12"),
        (boxed("9^{9^{9^9}}"), "12", False, 0.0, Status.TIMED_OUT, "9^{9^{9^9}}"),
    ]
    with Grader(TWO) as grader:
        verdicts = grader.grade([(text, gold, truncated) for text, gold, truncated, *_ in cases])
    assert [(v.reward, v.status, v.answer) for v in verdicts] == [tuple(case[3:]) for case in cases]
    assert verdicts[-1].detail == "killed after cpu_s = 0.5 s of processor time"
    assert counts([v.status for v in verdicts]) == {
        "correct": 3,
        "wrong": 3,
        "no_answer": 3,
        "truncated": 1,
        "timed_out": 1,
    }
    assert counts([]) == {"correct": 0, "wrong": 0, "no_answer": 0, "truncated": 0, "timed_out": 0}


def test_hostile_answers_are_killed_and_the_others_keep_their_order():
    items, expected = [], []
    for number, answer in enumerate(HANGS):
        # The correct ones take algebra, so that each of them meets a process that has just been replaced.
        items += [
            (boxed(answer), "5", False),
            (boxed(rf"\frac{{{2 * number + 1}}}{{2}}"), f"{number}.5", False),
            (boxed(f"{number}+x"), f"x+{number + 1}", False),
        ]
        expected += [Status.TIMED_OUT, Status.CORRECT, Status.WRONG]
    with Grader(TWO) as grader:
        verdicts = grader.grade(items)
        assert [v.status for v in verdicts] == expected
        assert all(text == boxed(v.answer) for v, (text, _, _) in zip(verdicts, items, strict=True))
        assert {v.detail for v in verdicts if v.status == Status.TIMED_OUT} == {
            "killed after cpu_s = 0.5 s of processor time"
        }
        assert len(children()) <= 2 and psutil.STATUS_ZOMBIE not in children().values()


def test_thousands_of_terms_and_megabytes_of_braces_do_not_stop_a_batch():
    terms = "+".join(f"\\frac{{1}}{{x_{{{i}}}}}" for i in range(3000))
    items = [
        (boxed(terms), "5", False),
        (r"\boxed{" * 300_000, "5", True),
        ("{" * 2_000_000, "5", False),
        (boxed("+".join(["1"] * 250)), "249", False),
        (boxed(r"\sqrt{16}"), "4", False),
    ]
    with Grader(CFG) as grader:
        statuses = [v.status for v in grader.grade(items)]
    assert statuses == [Status.NO_ANSWER, Status.TRUNCATED, Status.NO_ANSWER, Status.WRONG, Status.CORRECT]


def test_equal_questions_are_asked_once():
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    with Grader(TWO) as grader:
        verdicts = grader.grade([(boxed("9^{9^{9^9}}"), "5", False)] * 16)
    assert [v.status for v in verdicts] == [Status.TIMED_OUT] * 16
    # a kill at 0.5 s and a start-up, not 16 kills
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 4


def test_a_process_starts_only_for_algebra_and_is_kept():
    with Grader(TWO) as grader:
        assert [
            v.reward for v in grader.grade([(boxed("5"), "5.", False), (boxed("5"), "6", False), ("", "5", False)])
        ] == [1, 0, 0]
        assert children() == {}
        assert grader.grade([]) == []
        for first, second in [("1+x", "x+1"), ("1+y", "y+1")]:
            assert grader.grade([(boxed(first), second, False)])[0].status == Status.CORRECT
            pids = set(children())
            assert len(pids) == 1  # one question, one process, although two are allowed
        # A second process is started while the first one is busy: this one's end shows it.
        verdicts = grader.grade([(boxed(HANGS[0]), "5", False), (boxed("2+z"), "z+2", False)])
        assert [v.status for v in verdicts] == [Status.TIMED_OUT, Status.CORRECT]
        assert len(children()) == 1 and not pids & set(children())
    assert children() == {}


@pytest.fixture
def warm() -> "Grader":
    with Grader(replace(CFG, wall_s=5.0)) as grader:
        assert grader.grade([(boxed("1+x"), "x+1", False)])[0].status == Status.CORRECT
        yield grader
    assert children() == {}


def test_a_process_that_stands_still_is_killed_by_the_clock_and_replaced(warm):
    (pid,) = children()
    os.kill(pid, signal.SIGSTOP)
    verdicts = warm.grade([(boxed("2+x"), "x+2", False), (boxed("3+x"), "x+3", False)])
    assert verdicts[0] == Verdict(0.0, Status.TIMED_OUT, "2+x", "killed after wall_s = 5 s of clock time")
    assert verdicts[1].status == Status.CORRECT
    assert pid not in children()


def test_a_process_that_died_while_idle_is_replaced_and_costs_no_answer(warm):
    (pid,) = children()
    os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: is_gone(pid), 10)
    assert [v.status for v in warm.grade([(boxed(f"{i}+x"), f"x+{i}", False) for i in range(3)])] == [
        Status.CORRECT
    ] * 3
    assert pid not in children()


def test_a_question_that_a_process_has_not_read_when_it_is_gone_goes_to_another(warm):
    (pid,) = children()
    os.kill(pid, signal.SIGSTOP)
    killer = threading.Timer(0.5, os.kill, (pid, signal.SIGKILL))
    killer.start()
    (verdict,) = warm.grade([(boxed("2+x"), "x+2", False)])
    killer.join()
    assert verdict.status == Status.CORRECT and pid not in children()


def test_a_process_that_is_killed_at_work_costs_one_answer():
    with Grader(replace(CFG, cpu_s=60, wall_s=60)) as grader:
        grader.grade([(boxed("1+x"), "x+1", False)])
        (pid,) = children()
        killer = threading.Timer(0.5, os.kill, (pid, signal.SIGKILL))
        killer.start()
        verdicts = grader.grade([(boxed("9^{9^{9^9}}"), "5", False), (boxed("2+x"), "x+2", False)])
        killer.join()
    assert verdicts[0] == Verdict(0.0, Status.TIMED_OUT, "9^{9^{9^9}}", "ended by SIGKILL")
    assert verdicts[1].status == Status.CORRECT


def test_threads_get_the_replies_to_their_own_questions(warm):
    def ask(thread: int) -> list[bool]:
        golds = [f"{'x' if i % 2 else 'y'}+{100 * thread + i}" for i in range(20)]
        return [
            v.reward == 1.0
            for v in warm.grade([(boxed(f"{100 * thread + i}+x"), gold, False) for i, gold in enumerate(golds)])
        ]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == [[i % 2 == 1 for i in range(20)]] * 4


def test_processes_ignore_ctrl_c(warm):
    (pid,) = children()
    os.kill(pid, signal.SIGINT)
    assert warm.grade([(boxed("2+x"), "x+2", False)])[0].status == Status.CORRECT
    assert set(children()) == {pid}


def test_the_memory_limit_is_set(warm):
    (pid,) = children()
    assert psutil.Process(pid).rlimit(psutil.RLIMIT_AS) == (1 << 30, 1 << 30)


def test_too_little_memory_to_start_is_an_error_that_says_so():
    with Grader(replace(CFG, cpu_s=1, wall_s=1, memory_bytes=16 << 20)) as grader:
        with pytest.raises(RuntimeError, match="did not start.*memory_bytes = 16777216"):
            grader.grade([(boxed("1+x"), "x+1", False)])
        assert children() == {}


@pytest.fixture
def slow_start(tmp_path, monkeypatch):
    """Every new interpreter takes 3 s to start."""
    (tmp_path / "sitecustomize.py").write_text("import time\ntime.sleep(3)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_start_up_does_not_count(slow_start):
    with Grader(replace(CFG, cpu_s=1, wall_s=2.5)) as grader:
        assert grader.grade([(boxed("1+x"), "x+1", False)])[0].status == Status.CORRECT


def test_start_up_has_a_limit(slow_start, monkeypatch):
    monkeypatch.setattr(killable, "START_UP_S", 0.5)
    with Grader(CFG) as grader:
        with pytest.raises(RuntimeError, match="did not start: killed after start-up = 0.5 s"):
            grader.grade([(boxed("1+x"), "x+1", False)])
        assert children() == {}


def test_closing_twice_is_fine_and_a_closed_grader_refuses():
    grader = Grader(CFG)
    grader.grade([(boxed("1+x"), "x+1", False)])
    grader.close()
    grader.close()
    assert children() == {}
    with pytest.raises(ValueError, match="closed"):
        grader.grade([(boxed("5"), "5", False)])


@pytest.mark.parametrize("gold", [None, "", "  ", 5, "1" * 5000])
def test_a_gold_answer_that_is_none_is_an_error_that_names_the_item(gold):
    with Grader(CFG) as grader, pytest.raises(ValueError, match=r"items\[1\]: the gold answer"):
        grader.grade([(boxed("5"), "5", False), (boxed("5"), gold, False)])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"num_processes": 0}, "num_processes = 0"),
        ({"cpu_s": 0.0}, "cpu_s = 0"),
        ({"cpu_s": 31.0}, "cpu_s = 31.0, wall_s = 30.0"),
        ({"wall_s": float("inf")}, "wall_s = inf"),
        ({"memory_bytes": 0}, "memory_bytes = 0"),
    ],
)
def test_senseless_limits_are_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        Grader(replace(CFG, **arguments))


def start_script(body: str) -> subprocess.Popen:
    """A parent of its own, with a warm grader of one process that a question keeps busy for 2 s; it prints that one's
    id."""
    script = (
        "import os, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job has it ignored
        "from grpo_mcore.config.config import Reward\n"
        "from grpo_mcore.reward.grader import Grader\n"
        "easy, hard = (r'\\boxed{1+x}', 'x+1', False), (r'\\boxed{9^{9^{9^9}}}', '5', False)\n"
        "grader = Grader(Reward(num_processes=1, cpu_s=2.0, wall_s=60.0, memory_bytes=1 << 30))\n"
        "grader.grade([easy])\n"
        "print(grader._pool._processes[0].pid, flush=True)\n" + body
    )
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT)


@pytest.mark.parametrize(
    "body",
    [
        "time.sleep(60)",
        "while True: grader.grade([hard])",
        # a fork holds the pipe's other end open
        "sleeper = os.fork()\nif sleeper: print(sleeper, flush=True)\ntime.sleep(60)",
    ],
    ids=["idle", "busy", "forked"],
)
def test_processes_go_away_when_their_parent_is_killed(body):
    parent, sleeper = start_script(body), None
    try:
        pid = int(parent.stdout.readline())
        if "fork" in body:
            sleeper = int(parent.stdout.readline())
        time.sleep(0.5)  # so that the question has arrived
        assert not is_gone(pid)
        parent.send_signal(signal.SIGKILL)
        parent.wait(timeout=10)
        assert wait_until(lambda: is_gone(pid), 40)  # at most 2 s idle, 2 s of processor time at work
    finally:
        parent.kill()
        parent.wait(timeout=10)
        parent.stdout.close()
        if sleeper is not None:
            os.kill(sleeper, signal.SIGKILL)


def test_ctrl_c_ends_the_question_and_its_late_reply_meets_no_other():
    parent = start_script(
        "try:\n"
        "    while True: grader.grade([hard])\n"
        "except KeyboardInterrupt:\n"
        "    print(grader.grade([easy])[0].status, flush=True)\n"
    )
    try:
        pid = int(parent.stdout.readline())
        time.sleep(0.5)
        parent.send_signal(signal.SIGINT)
        assert parent.stdout.readline() == "correct\n"
        assert parent.wait(timeout=30) == 0
        assert is_gone(pid)
    finally:
        parent.kill()
        parent.wait(timeout=10)
        parent.stdout.close()
