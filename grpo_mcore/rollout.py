"""Prompts -> groups of responses, over all engines."""

import random
from collections.abc import Sequence

from grpo_mcore.engine import Completion, Engines, Sampling
from grpo_mcore.types import Group, Prompt, Response


class StaleError(RuntimeError):
    """A response was sampled with weights of another version than the step's."""


def rollout(
    engines: Engines, prompts: Sequence[Prompt], *, group_size: int, temperature: float, max_tokens: int, seed: int,
    version: int, top_p: float = 1.0, phase: str = "rollout",
) -> list[Group]:
    """One group of `group_size` responses per prompt, in the order of the prompts.

    The sample is a function of (seed, version, prompt's id and position), whatever engine draws it. Raises EngineError, StaleError.
    """
    requests = [
        (p.token_ids, Sampling(group_size, temperature, max_tokens, random.Random(f"{seed}/{version}/{phase}/{i}/{p.id}").getrandbits(31), top_p))
        for i, p in enumerate(prompts)
    ]
    return [
        Group(prompt, tuple(_response(c, version) for c in completions))
        for prompt, completions in zip(prompts, engines.generate(requests, phase), strict=True)
    ]


def _response(completion: Completion, version: int) -> Response:
    if completion.policy_version != version:
        raise StaleError(f"rollout: an engine sampled with weights of version {completion.policy_version}, the step needs {version}")
    if not completion.token_ids:
        raise RuntimeError("rollout: an engine returned an empty response")
    return Response(tuple(completion.token_ids), tuple(completion.logprobs), completion.truncated, version)
