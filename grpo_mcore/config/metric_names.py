"""The names of what a run of a configuration writes to metrics.jsonl: those that are in every row of their kind.

Rows of steps have more where there is more to say: time/eval_s and time/checkpoint_s of what was done since the row
before, mismatch/logprob_abs_mean_from_N of the lengths that were sampled, reward/NAME/extra/KEY of what a reward
function says besides its value, and OF_SOURCE with the name of each of several sources that the step has prompts of.
Nothing can be chosen or stopped by those.
"""

from grpo_mcore.config import data_sources
from grpo_mcore.config.config import Config

OF_SOURCE = ("reward/mean/", "reward/mixed_groups_frac/", "rollout/truncated_frac/", "rollout/prompts/")
# Beginnings of further names.
SOMETIMES = ("time/eval_s", "time/checkpoint_s", "mismatch/logprob_abs_mean_from_", *OF_SOURCE)

REWARD = "mean mixed_groups_frac timed_out seconds"
OF_VERIFIER, OF_FUNCTIONS = " correct wrong no_answer truncated", " scored failed not_applicable"
OF_FUNCTION = "mean failed timed_out not_applicable"  # each: reward/NAME/mean, ...
ROLLOUT = (
    "response_tokens_mean response_tokens_max truncated_frac masked_prompts_frac staleness_mean staleness_max "
    "groups_passed_over groups_without_variance groups_dropped engine_failures"
)
MISMATCH = "logprob_abs_mean logprob_abs_max beyond_cap_frac k3"
IMPORTANCE = "weight_mean beyond_cap_frac effective_frac"
UPDATE = "loss grad_norm lr entropy ratio clip_frac microbatches packed_frac imbalance"
REFIT = "canary_abs_mean engines attempts bytes gb_per_s seconds"
TIME = "refit_s rollout_s logprob_s update_s"
EVAL = "standard_error truncated_frac overlong_left_out"


def is_sometimes(name: str) -> bool:
    """Whether a row may have it, or not."""
    return name.startswith(SOMETIMES) or "/extra/" in name


def of_steps(config: Config) -> list[str]:
    """Of each step's row."""
    loss = config.loss
    update = UPDATE + " kl_to_ref" * (loss.kl_coef > 0) + " clip_dual_frac" * (loss.clip_dual is not None)
    functions = config.reward.functions
    names = {
        "reward": REWARD + (OF_FUNCTIONS if functions else OF_VERIFIER) + " disagree" * config.reward.compare_verifiers,
        **{f"reward/{f.label}": OF_FUNCTION for f in functions},
        "rollout": ROLLOUT + " prompts_left_out" * (config.data.max_pass_rate is not None),
        "environment": "turns_mean given_tokens_mean failed timed_out" * (config.environment is not None),
        "update": update,
        "mismatch": MISMATCH,
        "importance": IMPORTANCE * (loss.importance_level != "none"),
        "refit": REFIT,
        "time": TIME,
    }
    return [f"{stage}/{name}" for stage, words in names.items() for name in words.split()] + ["tokens_per_s"]


def of_evaluations(config: Config) -> list[str]:
    """Of each evaluation's row; none without eval.data."""
    if config.eval.data is None:
        return []
    k = config.eval.samples_per_prompt
    at_k = [f"mean@{k}", f"pass@{k}", *([f"maj@{k}"] if config.eval_verifier else [])]
    of_each = [f"{source}/{name}" for source in data_sources.several(config.eval.data) for name in at_k]
    return [f"eval/{name}" for name in (*at_k, *EVAL.split(), *of_each)]
