"""Reward functions in the plainest form, and one that asks somebody else. In the configuration:

reward:
  functions:
  - path: math_verify
  - {path: examples/rewards_of_your_own.py:in_order, weight: 0.2}
  - {path: examples/rewards_of_your_own.py:judged, weight: 0.5, wall_s: 60}
  - {path: examples/rewards_of_your_own.py:unlike_the_others, style: group, weight: 0.1}
"""

import asyncio
import re


def in_order(text, gold, row):
    """Whether the steps are numbered 1, 2, 3 ... None: there are none, and nothing is said."""
    steps = [int(number) for number in re.findall(r"^(\d+)\.", text, re.MULTILINE)]
    return float(steps == list(range(1, len(steps) + 1))) if steps else None


async def judged(text, gold, row):
    """Many calls are under way at the same time: here a model behind an address would be asked."""
    await asyncio.sleep(0.01)
    return {"score": min(len(set(text.split())) / 20, 1.0), "words": len(text.split())}


def unlike_the_others(texts, gold, row):
    """All responses to a prompt at once: the share of the others that say something else."""
    return [sum(other != text for other in texts) / max(len(texts) - 1, 1) for text in texts]
