"""Reward functions as TRL takes them. In the configuration:

reward:
  combine: normalized_sum
  functions:
  - path: examples/rewards_of_trl.py:accuracy_reward
  - {path: examples/rewards_of_trl.py:brevity_reward, weight: 0.1}
"""

import re


def accuracy_reward(completions, answer, **kwargs):
    """`answer` is a column of the data set."""
    last = [re.findall(r"-?\d+", text)[-1:] for text in completions]
    return [float(numbers == [right]) for numbers, right in zip(last, answer, strict=True)]


def brevity_reward(completion_ids, log_metric, **kwargs):
    lengths = [len(ids) for ids in completion_ids]
    log_metric("longest", max(lengths))
    return [-float(length) for length in lengths]
