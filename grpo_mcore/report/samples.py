"""What a step sampled: its metrics, and a row of RUN/rollouts for each response."""

from collections.abc import Callable, Iterator, Sequence

from grpo_mcore.reward.graded import Graded
from grpo_mcore.reward.grader import Verdict, counts


def sample_metrics(graded: Sequence[Graded]) -> dict[str, float]:
    """Of a step's groups; masked ones only count as such."""

    def mean(values: list) -> float:
        return sum(values) / len(values) if values else 0.0

    counted = [g for g in graded if not g.group.prompt.masked]
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
            if verdict.other is not None:
                row["other_verifier"] = _verdict(verdict.other)
            if index < keep_texts:
                row |= {"problem": prompt.problem, "gold": prompt.answer, "response": decode(response.token_ids)}
            yield row


def _verdict(v: Verdict) -> dict:
    return {"reward": v.reward, "status": v.status, "answer": v.answer, "detail": v.detail}
