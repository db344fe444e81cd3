"""What a step sampled: its metrics, and a row of RUN/rollouts for each response."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from grpo_mcore.reward.graded import Graded
from grpo_mcore.reward.grader import NO_VALUE, OF_FUNCTIONS, OF_VERIFIERS, Part, Verdict, counts
from grpo_mcore.types import Response


def sample_metrics(graded: Sequence[Graded]) -> dict[str, float]:
    """Of a step's groups; masked ones only count as such. Of several sources also of each that is in the step."""

    def mean(values: list) -> float:
        return sum(values) / len(values) if values else 0.0

    counted = [g for g in graded if not g.group.prompt.masked]
    of_sources: dict[str, float] = {}
    for name in dict.fromkeys(g.group.prompt.source for g in counted if g.group.prompt.source):
        mine = [g for g in counted if g.group.prompt.source == name]
        of_sources |= {
            f"reward/mean/{name}": mean([r for g in mine for r in g.rewards]),
            f"reward/mixed_groups_frac/{name}": mean([len(set(g.rewards)) > 1 for g in mine]),
            f"rollout/truncated_frac/{name}": mean([r.truncated for g in mine for r in g.group.responses]),
            f"rollout/prompts/{name}": float(len(mine)),
        }
    verdicts = [v for g in counted for v in g.verdicts]
    responses = [r for g in counted for r in g.group.responses]
    statuses = OF_FUNCTIONS if any(v.parts for g in graded for v in g.verdicts) else OF_VERIFIERS
    return {
        "reward/mean": mean([v.reward for v in verdicts]),
        "reward/mixed_groups_frac": mean([len(set(g.rewards)) > 1 for g in counted]),
        **{f"reward/{status}": float(n) for status, n in counts([v.status for v in verdicts], statuses).items()},
        **_of_functions([v.parts for v in verdicts]),
        **({"reward/disagree": float(sum(v.is_disputed for v in verdicts))} if any(v.other for v in verdicts) else {}),
        **_of_sessions(responses),
        "rollout/masked_prompts_frac": 1 - len(counted) / len(graded),
        "rollout/response_tokens_mean": mean([len(r.token_ids) for r in responses]),
        "rollout/response_tokens_max": float(max((len(r.token_ids) for r in responses), default=0)),
        "rollout/truncated_frac": mean([r.truncated for r in responses]),
        **of_sources,
    }


def _of_sessions(responses: Sequence[Response]) -> dict[str, float]:
    """Of an environment's; nothing where there is none."""
    outcomes = [r.outcome for r in responses if r.outcome is not None]
    if not outcomes:
        return {}
    given = [sum(end - start for start, end in r.given) for r in responses]
    return {
        "environment/turns_mean": sum(o.num_turns for o in outcomes) / len(outcomes),
        "environment/given_tokens_mean": sum(given) / len(given),
        **{f"environment/{s}": float(sum(o.status == s for o in outcomes)) for s in NO_VALUE[:2]},
    }


def _of_functions(parts: Sequence[Sequence[Part]]) -> dict[str, float]:
    """Of each of reward.functions: the mean of its values, how many responses have none, and why, and the means of the
    numbers that it says besides."""
    found: dict[str, float] = {}
    for of_function in zip(*parts, strict=True):
        said: dict[str, list[float]] = {"mean": [p.value for p in of_function if p.value is not None]}
        for part in of_function:
            for key, value in part.extra.items():
                if isinstance(value, (int, float)):
                    said.setdefault(f"extra/{key}", []).append(float(value))
        number = {f"{status}": float(n) for status, n in counts([p.status for p in of_function], NO_VALUE).items()}
        means = {key: sum(values) / len(values) if values else 0.0 for key, values in said.items()}
        found |= {f"reward/{of_function[0].name}/{key}": value for key, value in {**means, **number}.items()}
    return found


def rollout_rows(
    graded: Sequence[Graded], *, keep_texts: int, decode: Callable[[Sequence[int]], str]
) -> Iterator[dict]:
    """One of each response; the texts of the first `keep_texts` groups."""
    for index, g in enumerate(graded):
        prompt = g.group.prompt
        for sample, (response, verdict) in enumerate(zip(g.group.responses, g.verdicts, strict=True)):
            row = {
                "position": g.position,
                "prompt_id": prompt.id,
                "sample": sample,
                "prompt_tokens": len((response.prompt or prompt).token_ids),
                "response_tokens": len(response.token_ids),
                "truncated": response.truncated,
                "versions": response.versions,
                **_verdict(verdict),
            }
            if prompt.source:
                row["source"] = prompt.source
            if response.outcome is not None:
                row["session"] = dataclasses.asdict(response.outcome)
            if verdict.other is not None:
                row["other_verifier"] = _verdict(verdict.other)
            if verdict.parts:
                row["rewards"] = [dataclasses.asdict(part) for part in verdict.parts]
            if index < keep_texts:
                row |= {"problem": prompt.problem, "gold": prompt.answer, "response": decode(response.token_ids)}
                if response.given:
                    row["turns"] = [[who, decode(response.token_ids[a:b])] for who, a, b in spans(response)]
            yield row


def spans(response: Response) -> Iterator[tuple[str, int, int]]:
    """(sampled or given, start, end) of the parts of response.token_ids."""
    at = 0
    for start, end in (*response.given, (len(response.token_ids),) * 2):
        if at < start:
            yield "sampled", at, start
        if start < end:
            yield "given", start, end
        at = end


def _verdict(v: Verdict) -> dict:
    return {"reward": v.reward, "status": v.status, "answer": v.answer, "detail": v.detail}
