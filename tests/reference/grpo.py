"""The GRPO loss in Python floats (float64), one token at a time, from the formulas of the papers."""

import math
from collections.abc import Callable


def kl(current: float, ref: float, estimator: str) -> float:
    """k1, k2, k3 of http://joschu.net/blog/kl-approx.html: r = reference / policy, x sampled from the policy."""
    r = math.exp(ref) / math.exp(current)
    return {"k1": -math.log(r), "k2": math.log(r) ** 2 / 2, "k3": (r - 1) - math.log(r)}[estimator]


def surrogate(current: float, old: float, advantage: float, low: float, high: float) -> float:
    """PPO's objective of one token, to be maximised: min(ratio A, clip(ratio) A)."""
    ratio = math.exp(current) / math.exp(old)
    if ratio < 1 - low:
        clipped = 1 - low
    elif ratio > 1 + high:
        clipped = 1 + high
    else:
        clipped = ratio
    return min(ratio * advantage, clipped * advantage)


def loss(current: list[float], tokens: list[dict[str, float]], *, low: float, high: float, kl_coef: float, estimator: str) -> float:
    """tokens: one {old, ref, advantage, weight} for each log-prob of `current`."""
    total = 0.0
    for logprob, token in zip(current, tokens, strict=True):
        value = -surrogate(logprob, token["old"], token["advantage"], low, high)
        if kl_coef:
            value += kl_coef * kl(logprob, token["ref"], estimator)
        total += token["weight"] * value
    return total


def gradient(function: Callable[[list[float]], float], at: list[float], step: float = 1e-5) -> list[float]:
    """Central differences: error about step^2, plus 1e-16 / step of rounding."""
    out = []
    for i in range(len(at)):
        above, below = list(at), list(at)
        above[i] += step
        below[i] -= step
        out.append((function(above) - function(below)) / (2 * step))
    return out
