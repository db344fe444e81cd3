"""Reward functions as users bring them, of each style; and those that misbehave. Read by tests, as a file."""

import asyncio
import os
import re
import sys
import time


def value_of(text, gold):
    found = re.findall(r"-?\d+", text)
    return float(bool(found) and found[-1] == str(gold).strip())


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": value_of(solution_str, ground_truth), "characters": len(solution_str), "source": data_source}


def accuracy_reward(prompts, completions, completion_ids, answer, log_metric, **kwargs):
    assert len(prompts) == len(completions) == len(completion_ids) == len(answer) == len(kwargs["problem"])
    log_metric("tokens", sum(map(len, completion_ids)) / len(completion_ids))
    return [value_of(text, gold) for text, gold in zip(completions, answer, strict=True)]


def plain(text, gold, row):
    assert row["answer"] == gold
    return value_of(text, gold)


async def plain_async(text, gold, row):
    await asyncio.sleep(0.01)
    return value_of(text, gold)


async def slow_async(text):
    await asyncio.sleep(0.5)
    return 1


async def hangs_async(text):
    await asyncio.sleep(1000 if text == "3" else 0)
    return 1


def of_group(texts, gold, row):
    return [value_of(text, gold) for text in texts]


def not_always(completions, **kwargs):
    return [None if text == "4" else 2 for text in completions]


def sleeps(text):
    time.sleep(1000)


def spins(text):
    while True:
        pass


def eats(text):
    return len([bytes(1 << 20) for _ in range(1 << 20)])


def prints(text):
    print(input if text is None else "x" * (1 << 22))
    sys.stderr.write("y" * (1 << 22))
    return 1


def exits(text):
    print("going")
    os._exit(3)


def raises(text):
    return float(text.split("####")[1])


def says_words(text):
    return "good"


def not_finite(text):
    return float("nan")


def too_few(completions, **kwargs):
    return [1.0]


def unknown_column(completions, difficulty):
    return [1.0 for _ in completions]


def four(text, gold, row, more):
    return 1.0


def by_name_only(*, text):
    return 1.0


def reads_stdin(text):
    return float(sys.stdin.read() == "")


class Judge:
    """Not a function."""


class Scale:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, text, gold):
        return self.factor * value_of(text, gold)


twice = Scale(2)


def sleeps_at_work(text):
    """Well while it is tried, and never again."""
    if text and "####" not in text:
        time.sleep(1000)
    return 1
