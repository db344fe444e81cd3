"""A reward function as verl takes it. In the configuration:

reward:
  functions:
  - path: examples/reward_of_verl.py:compute_score
"""

import re


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    numbers = re.findall(r"-?\d+", solution_str)
    is_right = bool(numbers) and numbers[-1] == ground_truth
    return {"score": float(is_right), "num_numbers": len(numbers)}
