"""The stop rule: what ends a run before num_steps, read from the rows of its metrics.jsonl."""

from collections.abc import Sequence

from grpo_mcore.config import config

TRUNCATED = "rollout/truncated_frac"


def reason(rule: config.Stop, rows: Sequence[dict], step: int) -> str | None:
    """Why the run ends after `step` steps, or None.

    What is known then are the rows of those steps and the evaluations before the last of them: later rows do not count,
    so that a run that is taken up again is judged as it was.
    """
    if step < max(rule.after_steps, 1):
        return None
    known = [row for row in rows if row["step"] < step or (row["step"] == step and TRUNCATED in row)]
    return _plateau(rule, known) or _truncated(rule, known)


def _plateau(rule: config.Stop, rows: Sequence[dict]) -> str | None:
    if rule.plateau_window is None:
        return None
    n, values = rule.plateau_window, [row[rule.plateau_metric] for row in rows if rule.plateau_metric in row]
    if len(values) < 2 * n:
        return None
    before, last = sum(values[-2 * n : -n]) / n, sum(values[-n:]) / n
    if last - before > rule.plateau_min_gain:
        return None
    return (
        f"{rule.plateau_metric} went from {before:.4g} to {last:.4g}, means of {n} values, and "
        f"stop.plateau_min_gain is {rule.plateau_min_gain:g}"
    )


def _truncated(rule: config.Stop, rows: Sequence[dict]) -> str | None:
    if rule.truncated_above is None:
        return None
    values = [row[TRUNCATED] for row in rows if TRUNCATED in row][-rule.truncated_steps :]
    if len(values) < rule.truncated_steps or min(values) <= rule.truncated_above:
        return None
    return (
        f"{TRUNCATED} was {min(values):.4g} or more in {len(values)} steps, and stop.truncated_above is "
        f"{rule.truncated_above:g}"
    )
