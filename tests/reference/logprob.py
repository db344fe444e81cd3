"""Log-probs of a linear head in float64, one row at a time, from the definitions. Differentiable by autograd."""

import torch


def logits(hidden: torch.Tensor, weight: torch.Tensor, temperature: float) -> list[torch.Tensor]:
    """float64 [V] for each row of hidden [R, D]."""
    return [torch.stack([(h.double() * w.double()).sum() for w in weight]) / temperature for h in hidden]


def softmax(z: torch.Tensor) -> torch.Tensor:
    e = (z - z.detach().max()).exp()
    return e / e.sum()


def partials(hidden, weight, target: list[int], temperature: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(log sum exp z, z at the target or 0 if the shard has no such row, sum of softmax(z) z), float64 [R]."""
    out = []
    for z, t in zip(logits(hidden, weight, temperature), target, strict=True):
        top = z.detach().max()
        at_target = z[t] if 0 <= t < len(z) else z.sum() * 0
        out.append(torch.stack([top + (z - top).exp().sum().log(), at_target, (softmax(z) * z).sum()]))
    return tuple(torch.stack(out).unbind(1))


def logprob_and_entropy(hidden, weight, target: list[int], temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(log softmax(z) at the target, -sum of p log p), float64 [R]."""
    logprobs, entropies = [], []
    for z, t in zip(logits(hidden, weight, temperature), target, strict=True):
        p = softmax(z)
        logprobs.append(p[t].log())
        entropies.append(-sum(x * x.log() for x in p if x > 0))
    return torch.stack(logprobs), torch.stack(entropies)
