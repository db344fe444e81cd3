"""The GRPO loss in Python floats (float64), one token at a time, from the formulas of the papers."""

import math
from collections.abc import Callable


def kl(current: float, ref: float, estimator: str) -> float:
    """k1, k2, k3 of http://joschu.net/blog/kl-approx.html: r = reference / policy, x sampled from the policy."""
    r = math.exp(ref) / math.exp(current)
    return {"k1": -math.log(r), "k2": math.log(r) ** 2 / 2, "k3": (r - 1) - math.log(r)}[estimator]


def surrogate(ratio: float, advantage: float, low: float, high: float, dual: float | None = None) -> float:
    """PPO's objective of one token, to be maximised: min(ratio A, clip(ratio) A), and where A < 0 no less than dual
    A."""
    if ratio < 1 - low:
        clipped = 1 - low
    elif ratio > 1 + high:
        clipped = 1 + high
    else:
        clipped = ratio
    value = min(ratio * advantage, clipped * advantage)
    return max(value, dual * advantage) if dual and advantage < 0 else value


def ratios(current: list[float], tokens: list[dict[str, float]], policy_loss: str) -> list[float]:
    """Of each token, or for gspo the |y|-th root of the product over its response."""
    each = [math.exp(logprob) / math.exp(token["old"]) for logprob, token in zip(current, tokens, strict=True)]
    if policy_loss != "gspo":
        return each
    out = []
    for token in tokens:
        mine = [r for r, other in zip(each, tokens, strict=True) if other["sequence"] == token["sequence"]]
        out.append(math.prod(mine) ** (1 / len(mine)))
    return out


def loss(
    current: list[float],
    tokens: list[dict[str, float]],
    *,
    low: float,
    high: float,
    kl_coef: float = 0.0,
    estimator: str = "k3",
    kl_limit: float = math.inf,
    policy_loss: str = "ppo_clip",
    dual: float | None = None,
    entropy_coef: float = 0.0,
    frozen: list[float] | None = None,
) -> float:
    """tokens: one {old, ref, advantage, weight, sequence, importance, entropy} for each log-prob of `current`.
    `frozen`: the log-probs of cispo's weights, which have no gradient (None: current)."""
    total = 0.0
    for logprob, ratio, token in zip(current, ratios(frozen or current, tokens, policy_loss), tokens, strict=True):
        if policy_loss == "cispo":
            value = -min(max(ratio, 1 - low), 1 + high) * token["advantage"] * logprob
        else:
            value = -surrogate(ratio, token["advantage"], low, high, dual)
        value *= token["importance"]
        if kl_coef:
            value += kl_coef * min(max(kl(logprob, token["ref"], estimator), -kl_limit), kl_limit)
        value -= entropy_coef * token["entropy"]
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
