"""What a step sampled: its metrics, and a row of RUN/rollouts for each response."""

from collections.abc import Callable, Iterator, Sequence

from grpo_mcore.reward.graded import Graded
from grpo_mcore.reward.grader import Verdict, counts


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
    return {
        "reward/mean": mean([v.reward for v in verdicts]),
        "reward/mixed_groups_frac": mean([len(set(g.rewards)) > 1 for g in counted]),
        **{f"reward/{status}": float(count) for status, count in counts(verdicts).items()},
        **({"reward/disagree": float(sum(v.is_disputed for v in verdicts))} if any(v.other for v in verdicts) else {}),
        "rollout/masked_prompts_frac": 1 - len(counted) / len(graded),
        "rollout/response_tokens_mean": mean([len(r.token_ids) for r in responses]),
        "rollout/response_tokens_max": float(max((len(r.token_ids) for r in responses), default=0)),
        "rollout/truncated_frac": mean([r.truncated for r in responses]),
        **of_sources,
    }


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
                "prompt_tokens": len(prompt.token_ids),
                "response_tokens": len(response.token_ids),
                "truncated": response.truncated,
                "versions": response.versions,
                **_verdict(verdict),
            }
            if prompt.source:
                row["source"] = prompt.source
            if verdict.other is not None:
                row["other_verifier"] = _verdict(verdict.other)
            if index < keep_texts:
                row |= {"problem": prompt.problem, "gold": prompt.answer, "response": decode(response.token_ids)}
            yield row


def _verdict(v: Verdict) -> dict:
    return {"reward": v.reward, "status": v.status, "answer": v.answer, "detail": v.detail}
