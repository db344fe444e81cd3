"""Log-probs of a linear head in float64, one row at a time, from the definitions. Differentiable by autograd.

And what the tests of every form share: the naive form, whose errors are the others' budget, and logits at the extremes.
"""

import torch

OUTPUTS = ("logsumexp", "target", "mean_logit")

# Four logits each.
EXTREMES = {
    "one far above": [1e4, -1e4, 0.0, 3.0],
    "far above comes last": [-1e4, 0.0, 3.0, 1e4],
    "two tie far above": [-1e4, 1e4, 0.0, 1e4],
    "all far below": [-1e4, -1e4, -1e4, -1e4],
    "one far below": [0.5, -1e4, 0.25, 0.0],
}


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


def naive(hidden, weight, target, temperature: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What one writes first: everything in the inputs' dtype."""
    return naive_of_logits(hidden @ weight.T / temperature, target)


def naive_of_logits(z, target) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    inside = (target >= 0) & (target < z.shape[1])
    at_target = torch.where(inside, z.gather(1, torch.where(inside, target, 0)[:, None])[:, 0], 0)
    return z.logsumexp(1), at_target, (z.softmax(1) * z).sum(1)


def differentiate(function, hidden, weight, upstream: dict[str, torch.Tensor]):
    """(the three outputs, gradients of hidden and weight) for sum over outputs of upstream * output."""
    hidden, weight = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    outputs = dict(zip(OUTPUTS, function(hidden, weight), strict=True))
    sum((upstream[name].to(outputs[name].dtype) * outputs[name]).sum() for name in upstream).backward()
    return {name: x.detach() for name, x in outputs.items()}, {"hidden": hidden.grad, "weight": weight.grad}
