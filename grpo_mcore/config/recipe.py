"""The DeepScaleR recipe, quantity by quantity: what a configuration does, beside what the two published runs did.

    guide      NeMo RL's "GRPO on DeepScaler"; what configs/deepscaler_*.yaml follow
    original   the first publication, agentica's DeepScaleR; what configs/original/deepscaler_*.yaml follow

Both have stages of 8K, 16K and 24K tokens. The two are often taken for one another: their prompts, rewards, losses,
optimizer mini-batches (64 responses, 64 prompts) and sampling differ. A quantity that the code fixes is a row too.
"""

import hashlib
import operator
from collections.abc import Callable
from dataclasses import dataclass

from grpo_mcore.config import data_sources
from grpo_mcore.config.config import EXPONENT_LIMIT, Config, InputError, Stop

SAMPLE_PROMPT_TOKENS = 192  # of the prompt after which the limit of a response is compared

MODEL = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
TRAINING_SET = "agentica-org/DeepScaleR-Preview-Dataset"
INITIAL, RECOMPUTED = "the stage's initial weights", "recomputed by the trainer"
GUIDE_PROMPT = (
    "Think step-by-step to solve the following problem. Output your answer inside of \\\\boxed{} "
    "tags.:\n{problem}\n\nLet's think step-by-step"
)
ORIGINAL_PROMPT = "{problem} Let's think step by step and output the final answer within \\boxed{}."


@dataclass(frozen=True)
class Each:
    """One value a stage."""

    of_8k: object
    of_16k: object
    of_24k: object


@dataclass(frozen=True)
class Row:
    """`of` is the effective quantity of a configuration; `guide` and `original` are values of all stages, or Each;
    None: not said."""

    quantity: str
    of: Callable[[Config], object]
    guide: object
    original: object
    unit: str = ""

    def published(self, recipe: str) -> object:
        run, _, stage = recipe.partition("/")
        value = {"guide": self.guide, "original": self.original}[run]
        return getattr(value, f"of_{stage}") if isinstance(value, Each) else value


def key(dotted: str) -> Callable[[Config], object]:
    """The value of a configuration's key."""

    def of(config: Config) -> object:
        value = config
        for name in dotted.split("."):
            value = getattr(value, name)
        return "none" if value is None else value

    return of


def data_set(dotted: str) -> Callable[[Config], object]:
    """What data.train or eval.data names, in a line."""
    return lambda config: data_sources.shown(operator.attrgetter(dotted)(config)) or "none"


def fixed(value: object) -> Callable[[Config], object]:
    """What no key changes."""
    return lambda config: value


def optimizer_steps(c: Config) -> str:
    return f"{c.optimizer_steps_per_step} optimizer steps per step of {c.batch.global_batch_size} responses"


def warm_up(c: Config) -> str:
    o = c.optimizer
    return f"{o.warmup_steps} steps from {o.warmup_start_frac:g} x" if o.warmup_steps else "none"


def training_precision(c: Config) -> str:
    return c.precision.params + (f", FP8 {c.precision.fp8}" if c.precision.fp8 else "")


ROWS = (
    Row("model", key("model"), Each(MODEL, None, None), Each(MODEL, None, None)),
    Row("training set", data_set("data.train"), TRAINING_SET, TRAINING_SET),
    Row("prompts per step", key("rollout.prompts_per_step"), 128, 128, "prompts"),
    Row("responses per prompt", key("rollout.group_size"), 8, Each(8, 16, 16), "responses"),
    Row(
        "optimizer steps",
        optimizer_steps,
        "16 optimizer steps per step of 64 responses",
        Each("2 optimizer steps per step of 512 responses", *["2 optimizer steps per step of 1024 responses"] * 2),
    ),
    Row("passes over a batch", fixed(1), 1, 1),
    Row("steps", key("num_steps"), Each(240, 290, 50), Each(1040, 480, 230), "RL steps"),
    Row("ended early", lambda c: c.stop != Stop(), False, False, "by a stop rule"),
    Row("learning rate", key("optimizer.lr"), Each(2e-6, 2e-6, 5e-7), 1e-6),
    Row("learning rate after the warm-up", key("optimizer.lr_schedule"), "constant", "constant"),
    Row("warm-up", warm_up, "50 steps from 0.1 x", "none"),
    Row("AdamW betas", lambda c: (c.optimizer.beta1, c.optimizer.beta2), (0.9, 0.999), (0.9, 0.999)),
    Row("AdamW eps", key("optimizer.eps"), 1e-8, 1e-8),
    Row("weight decay", key("optimizer.weight_decay"), 0.01, 0.01),
    Row("what is decayed", key("optimizer.decay"), "all", "all"),  # torch's AdamW, in both
    Row("gradient clip", key("optimizer.clip_grad"), 1.0, 1.0, "global norm"),
    Row("main weights", fixed("float32"), None, "float32"),
    Row("training precision", training_precision, "bfloat16", "bfloat16"),
    Row("KL coefficient", key("loss.kl_coef"), Each(0.0, 0.001, 0.0001), 0.001),
    Row("KL estimator", key("loss.kl_estimator"), "k3", "k3"),
    Row("KL clamp, input", fixed(EXPONENT_LIMIT), 20.0, None, "+-"),
    Row("KL clamp, output", key("loss.kl_limit"), 10.0, 10.0, "+-"),
    Row("reference policy", fixed(INITIAL), INITIAL, INITIAL),
    Row(
        "ratio clip, low and high",
        lambda c: (c.loss.clip_low, c.loss.clip_high),
        Each((0.2, 0.2), (0.2, 0.28), (0.2, 0.28)),
        (0.2, 0.2),
    ),
    Row("policy loss", key("loss.policy_loss"), "ppo_clip", "ppo_clip"),
    Row("correction for what sampled", key("loss.importance_level"), "none", "none"),
    Row("entropy bonus", key("loss.entropy_coef"), 0.0, 0.001),
    Row("advantage baseline", key("advantage.baseline"), "leave_one_out", "mean"),
    Row("advantage over the std", key("advantage.normalize_by_std"), True, True, "of the same responses"),
    Row("advantage where the std is 0", fixed("not normalised"), "not normalised", None),
    # The original's sum of microbatches' means depends on how tokens fall into microbatches: it is not built.
    Row("loss aggregation", key("loss.aggregation"), "token_mean", "token_mean of each microbatch, summed"),
    # guide: what leaves room for a token
    Row("longest prompt", key("data.max_prompt_tokens"), Each(8191, 16383, 24575), 1024, "tokens"),
    Row("over-long prompts", key("data.overlong_prompts"), "mask", "filter"),
    Row(
        "longest sequence",
        lambda c: c.longest_train_tokens,
        Each(8192, 16384, 24576),
        Each(9216, 17408, 25600),
        "tokens",
    ),
    Row(
        "longest response",
        lambda c: c.response_tokens(SAMPLE_PROMPT_TOKENS),
        Each(8000, 16192, 24384),
        Each(8192, 16384, 24576),
        f"tokens after {SAMPLE_PROMPT_TOKENS}",
    ),
    Row("truncated responses left out", key("loss.skip_truncated"), False, False),
    Row("overlong penalty", key("shaping.overlong_buffer_tokens"), 0, 0, "over the last tokens"),
    Row("groups replaced", key("rollout.dynamic_sampling"), False, False, "without variance"),
    Row("staleness", key("rollout.max_staleness"), 0, 0, "steps"),
    Row("temperature", key("rollout.temperature"), 1.0, 0.6),
    Row("top_p", fixed(1.0), 1.0, 1.0),
    Row("old log-probs", fixed(RECOMPUTED), RECOMPUTED, RECOMPUTED),
    Row("logits divided by temperature", fixed(True), None, True),
    Row("user prompt", key("data.prompt_template"), GUIDE_PROMPT, ORIGINAL_PROMPT),
    Row("chat template", key("data.chat_template"), True, True),
    Row("system prompt", key("data.system_prompt"), "none", "none"),
    Row("reward", fixed("1 or 0"), "1 or 0", "1 or 0"),
    Row("verifier", key("reward.verifier"), "math_verify", "boxed"),
    Row("think tags required", key("reward.require_think"), False, True),
    Row("validation set", data_set("eval.data"), "HuggingFaceH4/aime_2024", "HuggingFaceH4/aime_2024"),
    Row("validation samples", key("eval.samples_per_prompt"), 16, Each(8, 16, 16), "a problem"),
    Row("validation every", key("eval.every"), 10, Each(20, 10, 10), "steps"),
    Row("validation temperature", key("eval.temperature"), 1.0, 0.6),
    Row("validation top_p", key("eval.top_p"), 1.0, 1.0),
    Row(
        "longest validation response",
        lambda c: c.response_tokens(SAMPLE_PROMPT_TOKENS, evaluation=True),
        Each(8000, 16192, 24384),
        Each(8192, 16384, 24576),
        f"tokens after {SAMPLE_PROMPT_TOKENS}",
    ),
    Row("checkpoint every", key("checkpoint.every"), 10, Each(20, 10, 10), "steps"),
    Row(
        "best checkpoints kept",
        lambda c: c.checkpoint.keep_best if c.checkpoint.best_metric.startswith("eval/mean@") else 0,
        10,
        None,
        "by validation accuracy",
    ),
    Row("tensor parallel", key("parallel.tp"), Each(1, 2, 2), None, "ranks"),
    Row("seed", key("seed"), 42, None),
)


def deviations(config: Config) -> list[str]:
    """The quantities in which a configuration deviates from its recipe, declared or not. Raises InputError for a
    declared one that is none."""
    known = [row.quantity for row in ROWS]
    for name in config.recipe_deviations:
        if name not in known:
            raise InputError(
                "recipe_deviations", name, "is no quantity of the recipe", f"name one of: {', '.join(known)}"
            )
    if config.recipe is None:
        return []
    return [
        row.quantity for row in ROWS if (value := row.published(config.recipe)) is not None and row.of(config) != value
    ]


def describe(config: Config) -> str:
    """The table of a configuration that follows a recipe, as YAML comments; of another, nothing."""
    found = deviations(config)
    if config.recipe is None:
        return ""
    stage = config.recipe.partition("/")[2]
    table: list[tuple[str, ...]] = [("", "quantity", "this run", f"guide {stage}", f"original {stage}")]
    for row in ROWS:
        declared = "declared" if row.quantity in config.recipe_deviations else "DEVIATES"
        name = f"{row.quantity} ({row.unit})" if row.unit else row.quantity
        values = row.of(config), row.published(f"guide/{stage}"), row.published(f"original/{stage}")
        table.append((declared if row.quantity in found else "", name, *map(text, values)))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    head = f"# recipe {config.recipe}; DEVIATES: from it; declared: by recipe_deviations; -: not said"
    lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in table]
    return "\n".join([head, *(f"# {line}" for line in lines)])


def summary(config: Config) -> str:
    """What a run says before it starts."""
    undeclared = [name for name in deviations(config) if name not in config.recipe_deviations]
    deviating = f", deviating in {', '.join(undeclared)}" if undeclared else ""
    return optimizer_steps(config) + (f"; recipe {config.recipe}{deviating}" if config.recipe else "")


def text(value: object) -> str:
    """Of a table's cell; of a long or broken text its size and digest."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return " / ".join(map(text, value))
    if isinstance(value, float):
        return f"{value:g}"
    out = str(value)
    if len(out) > 50 or "\n" in out:
        data = out.encode()
        return f"{len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()[:12]}"
    return out
