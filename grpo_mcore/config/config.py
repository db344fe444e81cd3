"""The run's configuration: frozen, total, strict. Every key is documented where it is defined, here and in task.py.

A field's type says what it may be (bounds.py), its comment what it is: schema.py makes configs/schema.json and
docs/configuration.md of both. file.py reads it from YAML, rules.py says what must hold between fields. Nothing writes
to a Config.
"""

import typing
from dataclasses import dataclass, field
from typing import Literal

from grpo_mcore.config.bounds import (
    Count,
    Decay,
    Draws,
    DualClip,
    ExpertParallel,
    Fraction,
    GroupSize,
    ImportanceCap,
    LearningRate,
    Multiple,
    NonNegativeFloat,
    NonNegativeFraction,
    NonNegativeInt,
    PathText,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    Seconds,
    Seed,
    Steps,
    Temperature,
    Threads,
)
from grpo_mcore.config.task import (
    ENVIRONMENT as ENVIRONMENT,
    VERIFIERS as VERIFIERS,
    AnswerFrom as AnswerFrom,
    Data as Data,
    DataFormat as DataFormat,
    Environment as Environment,
    Eval as Eval,
    Reward as Reward,
    RewardFunction as RewardFunction,
    Shaping as Shaping,
    Source as Source,
    Verifier as Verifier,
    WarmStart as WarmStart,
)

FP8_ALIGN = 16  # cuBLAS: every dimension of an FP8 matrix product is a multiple of it
# Attention without a fused kernel keeps a score for each pair of tokens, of every sequence as for the longest: on a GPU
# it is for sequences of at most so many tokens.
PLAIN_ATTENTION_TOKENS = 1024
EXPONENT_LIMIT = 20.0  # log-ratios are clamped to +- this before exp: of the loss, and a term of every recipe


class InputError(Exception):
    """What a user got wrong, in one line: field, value seen, constraint, remedy. Shown without a traceback."""

    def __init__(self, name: str, value: object, constraint: str, remedy: str):
        line = f"{_short(name)} = {_short(repr(value))}: {_short(constraint)}. Remedy: {remedy}."
        # A path may hold bytes that no console takes.
        super().__init__(" ".join(line.splitlines()).encode("utf-8", "backslashreplace").decode())


def _short(text: str) -> str:
    return text if len(text) <= 1000 else f"{text[:400]} ... ({len(text)} characters)"


class RunError(RuntimeError):
    """What ends a run that began well: says all that a traceback would, and is shown without one."""


@dataclass(frozen=True)
class Parallel:
    """Sizes of the axes over which the trainer's ranks share one model. Data parallel is what remains of the ranks, and
    shards the optimizer."""

    tp: PositiveInt = 1  # tensor parallel: ranks that split each matrix
    pp: PositiveInt = 1  # pipeline parallel: stages of layers
    virtual_pp: PositiveInt = 1  # model chunks of one pipeline stage; above 1 the schedule is interleaved
    cp: PositiveInt = 1  # context parallel: ranks that split each sequence
    ep: ExpertParallel = 1  # expert parallel: not built
    sequence_parallel: bool = False  # split activations by tokens between tp's matrix products
    overlap_grad_reduce: bool = False  # reduce gradients during the backward pass
    overlap_param_gather: bool = False  # gather updated weights during the next forward pass
    # activations computed again in the backward pass; selective: of recompute_modules; full: of whole layers
    recompute: Literal["none", "selective", "full"] = "none"
    # modules whose activations recompute: selective computes again
    recompute_modules: tuple[Literal["core_attn", "mlp"], ...] = ("core_attn",)
    recompute_num_layers: PositiveInt = 1  # with recompute: full, layers between two kept activations

    @property
    def ranks_per_replica(self) -> int:
        """Ranks that one copy of the model takes."""
        return self.tp * self.pp * self.cp


@dataclass(frozen=True)
class Precision:
    """Number formats of the trainer. The head, the norms, the residual stream and the optimizer never run in FP8."""

    # of weights and activations; with bfloat16 the optimizer keeps float32 main weights
    params: Literal["float32", "bfloat16"] = "bfloat16"
    # how Transformer Engine scales the layers' FP8 matrix products; null: no FP8
    fp8: Literal["delayed", "tensorwise", "blockwise"] | None = None
    fp8_format: Literal["hybrid", "e4m3"] = "hybrid"  # hybrid: gradients in e5m2, the rest in e4m3; e4m3: all
    fp8_amax_history: PositiveInt = 1024  # with fp8: delayed, steps whose largest value sets the scale
    fp8_first_layers_bf16: NonNegativeInt = 0  # layers at the model's start that stay in bfloat16
    fp8_last_layers_bf16: NonNegativeInt = 0  # layers at the model's end that stay in bfloat16


@dataclass(frozen=True)
class Kernels:
    """Which form a kernel has. auto: Triton's on CUDA, plain PyTorch elsewhere."""

    linear_logprob: Literal["auto", "reference", "triton"] = "auto"  # from hidden states to log-probs and entropies
    # an update takes the loss's gradient together with the log-probs, from logits that are computed once: a quarter
    # less of the head's work, where policy_loss is not gspo; false: from logits computed twice
    linear_grpo: bool = True
    # of the head, for logits or their gradients; null: where logits are computed once 256 MiB on a CPU and 1.75 GiB on
    # a GPU, where twice 512 MiB on a GPU
    workspace_bytes: PositiveInt | None = None


@dataclass(frozen=True)
class Optimizer:
    """AdamW and its learning rate."""

    lr: LearningRate = 1e-6  # learning rate
    lr_schedule: Literal["constant", "linear"] = "constant"  # linear: from lr to 0 over num_steps
    warmup_steps: NonNegativeInt = 0  # steps over which the learning rate rises; 0: no warm-up
    warmup_start_frac: Fraction = 0.1  # where the warm-up starts, as a share of the learning rate
    beta1: Decay = 0.9  # decay of the gradient's running mean
    beta2: Decay = 0.999  # decay of the squared gradient's running mean
    eps: PositiveFloat = 1e-8  # added to an update's denominator: with 0 a weight without gradient becomes NaN
    weight_decay: NonNegativeFloat = 0.01  # decoupled from the gradient
    # what is decayed; matrices: neither norms nor biases, which are vectors
    decay: Literal["all", "matrices"] = "all"
    clip_grad: NonNegativeFloat = 1.0  # largest global norm of the gradient; 0: no clipping


@dataclass(frozen=True)
class Rollout:
    """How many responses are sampled a step, and how."""

    prompts_per_step: Count = 128  # prompts of one step, each with a group of responses
    group_size: GroupSize = 8  # responses per prompt
    temperature: Temperature = 1.0  # logits are divided by it, in sampling and in the loss
    max_response_tokens: PositiveInt = 7168  # a response that reaches it is truncated
    max_staleness: NonNegativeInt = 0  # steps by which sampling may run ahead of training; 0: they take turns
    # what a refit does to the keys and values of responses that are still running, which are of the old weights
    cache_after_refit: Literal["recompute", "keep"] = "recompute"
    dynamic_sampling: bool = False  # a group without variance in its rewards is replaced by another prompt's
    # with dynamic_sampling: most prompts drawn for one step, as a multiple of prompts_per_step; beyond, groups without
    # variance are kept
    max_draws: Draws = 3.0
    # with dynamic_sampling: prompts drawn ahead of need, as a multiple of prompts_per_step
    oversampling_frac: Multiple = 0.0
    keep_texts: NonNegativeInt = 4  # groups per step whose texts are kept in RUN/rollouts
    max_total_tokens: PositiveInt | None = None  # prompt and response together; null: no limit but their own
    timeout_s: Seconds = 3600.0  # for all responses of a step


@dataclass(frozen=True)
class Engine:
    """vLLM, which samples. One engine is one Ray actor."""

    num_engines: Count = 1  # engines, which share the prompts of a step
    # colocated: on the trainers' GPUs, in turns; disaggregated: on GPUs of their own; auto: cpu, or colocated
    placement: Literal["auto", "cpu", "colocated", "disaggregated"] = "auto"
    tp: PositiveInt = 1  # GPUs (CPU: processes) of one engine, on one machine
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the engine's weights and activations
    # FP8 that the engine makes of its weights at each refit; null: none
    quantization: Literal["fp8_per_tensor", "fp8_per_block"] | None = None
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"  # of cached keys and values; auto: dtype's; fp8: on a GPU only
    # memory for keys and values; null: what gpu_memory_frac leaves (a CPU engine needs a number)
    kv_cache_bytes: PositiveInt | None = None
    # share of a GPU's memory that an engine takes; null: 0.5 in turns with a trainer, 0.9 where it is alone
    gpu_memory_frac: PositiveFraction | None = None
    max_running_responses: Count = 256  # responses that one engine samples at a time
    # tokens of one engine step; null: 8192 on a GPU, 2048 on a CPU, which takes at least the longest sequence
    max_batched_tokens: PositiveInt | None = None
    prefix_caching: bool = True  # siblings share the keys and values of their prompt
    enforce_eager: bool = False  # no compiled graphs; a CPU engine never has them
    # what leaves the GPU while colocated engines sample
    offload_trainer: tuple[Literal["gradients", "optimizer"], ...] = ("gradients", "optimizer")
    num_threads: Threads = 1  # CPU threads of one engine
    # CPU cores that the engines are bound to, num_threads each in turn; empty: any
    cores: tuple[NonNegativeInt, ...] = ()
    start_timeout_s: Seconds = 600.0  # for an engine to start
    health_timeout_s: Seconds = 60.0  # an engine that does not answer for so long is replaced
    max_failures: NonNegativeInt = 3  # failures of engines in one process's life; one more stops the run

    def is_colocated(self, device: str) -> bool:
        """Whether engines and trainers of this device (cpu, cuda) take turns on it."""
        return device == "cuda" and self.placement in ("auto", "colocated")

    def share_of_gpu(self, *, in_turns: bool) -> float:
        """Of its memory; `in_turns`: a trainer has the same GPU."""
        return self.gpu_memory_frac or (0.5 if in_turns else 0.9)

    def tokens_per_step(self, device: str) -> int:
        """Most tokens of one engine step on this device (cpu, cuda)."""
        return self.max_batched_tokens or (8192 if device == "cuda" else 2048)


@dataclass(frozen=True)
class Advantage:
    """How the rewards of a group become advantages (formulas in advantage.py)."""

    # what is subtracted from a reward; mean: its group's mean; leave_one_out: the mean of the others in the group
    baseline: Literal["mean", "leave_one_out"] = "mean"
    normalize_by_std: bool = True  # divide by the standard deviation of the same responses as the baseline


@dataclass(frozen=True)
class Loss:
    """Formulas and sources stand in loss.py; aggregation and skip_truncated in batch.py."""

    # ppo_clip: the clipped ratio of each token; gspo: of its whole response; cispo: of each token, as a weight without
    # gradient
    policy_loss: Literal["ppo_clip", "gspo", "cispo"] = "ppo_clip"
    clip_low: NonNegativeFraction = 0.2  # the ratio is clipped to at least 1 - clip_low
    clip_high: NonNegativeFloat = 0.2  # the ratio is clipped to at most 1 + clip_high
    clip_dual: DualClip | None = None  # bound of the ratio where the advantage is negative; null: none
    kl_coef: NonNegativeFloat = 0.0  # weight of the KL divergence to the reference policy; 0: there is none
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"  # of a token's KL divergence (Schulman's names)
    kl_limit: PositiveFloat | None = None  # a token's estimate is clamped to +-kl_limit; null: it is not
    entropy_coef: NonNegativeFloat = 0.0  # weight of the entropy bonus
    # token_mean: over all tokens; sequence_mean: over each response's tokens, then over the responses; constant: the
    # sum, divided by rollout.max_response_tokens times the responses
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    # responses that hit the length limit have no loss; in their group's advantages they count
    skip_truncated: bool = False
    # correct for what sampled by the weight exp(old - rollout), of a token or a whole response
    importance_level: Literal["none", "token", "sequence"] = "none"
    importance_cap: ImportanceCap = 2.0  # cap of the importance correction's weights
    # truncate: weights above the cap become the cap; mask: those outside [1 / cap, cap] become 0
    importance_mode: Literal["truncate", "mask"] = "truncate"


@dataclass(frozen=True)
class Batch:
    """How a step's responses are cut into optimizer steps and microbatches."""

    global_batch_size: PositiveInt = 64  # responses per optimizer step, over all ranks
    max_tokens_per_microbatch: PositiveInt = 8192  # packed tokens of one forward pass on one rank


@dataclass(frozen=True)
class Refit:
    """How the trainer's weights get into the engines."""

    # broadcast: over the network; shared: by this machine's memory (GPU: the same GPU's); auto: shared where all
    # engines can
    transport: Literal["auto", "broadcast", "shared"] = "auto"
    bucket_bytes: PositiveInt | None = None  # weights sent at a time; null: 8 MiB on a CPU, 256 MiB on a GPU
    timeout_s: Seconds = 300.0  # for each answer of an engine
    # largest mean |engine - trainer| log-prob after a refit; null: 1e-3 if both are float32, else 0.15, with
    # engine.quantization 0.5
    canary_tolerance: PositiveFloat | None = None


@dataclass(frozen=True)
class Mismatch:
    """Bounds of mismatch/logprob_abs_mean: what an engine sampled with against what the trainer scores."""

    warn_above: PositiveFloat | None = 0.1  # above it a warning is printed; null: never
    stop_above: PositiveFloat | None = None  # above it the run ends; null: never


@dataclass(frozen=True)
class Checkpoint:
    """What is kept in RUN/checkpoints to go on from."""

    every: NonNegativeInt = 10  # steps between two checkpoints; also after the last; 0: none is kept
    keep: PositiveInt = 2  # the newest ones that are kept
    keep_best: NonNegativeInt = 0  # kept besides: so many with the highest best_metric
    best_metric: str = "reward/mean"  # a metric of metrics.jsonl, such as eval/mean@8
    # another run's checkpoint, whose weights and optimizer a run begins with; null: `model`'s, and a fresh optimizer
    start_from: PathText | None = None
    asynchronous: bool = True  # written in the background while the next step runs
    timeout_s: Seconds = 1800.0  # for one save


@dataclass(frozen=True)
class Stop:
    """Ends a run before num_steps, after the first step whose metrics show a plateau or too much truncation."""

    after_steps: NonNegativeInt = 0  # neither is looked for before so many steps
    # plateau: the mean of this many last values of plateau_metric is compared with that of as many before; null: not
    # looked for
    plateau_window: PositiveInt | None = None
    plateau_metric: str = "reward/mean"  # a metric of metrics.jsonl, such as eval/mean@16
    plateau_min_gain: NonNegativeFloat = 0.0  # a plateau: the mean has not risen by more than this
    # truncation: rollout/truncated_frac is above this in each of the last truncated_steps steps; null: not looked for
    truncated_above: Fraction | None = None
    # steps in a row with rollout/truncated_frac above truncated_above that end the run
    truncated_steps: PositiveInt = 10


@dataclass(frozen=True)
class Config:
    """What stands at the top of the file, outside of any section."""

    model: PathText  # Hugging Face folder or hub name, a .gguf file, or package:NAME/FILE.gguf
    run_dir: PathText  # RUN: the folder of all that the run writes, and goes on from if it is started again
    num_steps: Steps  # rounds of refit, rollout and update
    data: Data
    seed: Seed = 42  # of sampling, of the prompts' order and of a warm start
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    deterministic: bool = False  # the same numbers in every run on a GPU, slower; a CPU's are anyway
    num_threads: Threads = 1  # CPU threads of one trainer rank
    collective_timeout_s: Seconds = 1800.0  # longest wait of a rank for the others, beyond rollout.timeout_s
    # the published recipe that this follows, see recipe.py; null: none
    recipe: Literal["guide/8k", "guide/16k", "guide/24k", "original/8k", "original/16k", "original/24k"] | None = None
    recipe_deviations: tuple[str, ...] = ()  # quantities of the recipe in which this deviates on purpose
    warm_start: WarmStart | None = None
    parallel: Parallel = field(default_factory=Parallel)
    precision: Precision = field(default_factory=Precision)
    kernels: Kernels = field(default_factory=Kernels)
    optimizer: Optimizer = field(default_factory=Optimizer)
    rollout: Rollout = field(default_factory=Rollout)
    engine: Engine = field(default_factory=Engine)
    reward: Reward = field(default_factory=Reward)
    environment: Environment | None = None
    shaping: Shaping = field(default_factory=Shaping)
    advantage: Advantage = field(default_factory=Advantage)
    loss: Loss = field(default_factory=Loss)
    batch: Batch = field(default_factory=Batch)
    refit: Refit = field(default_factory=Refit)
    mismatch: Mismatch = field(default_factory=Mismatch)
    eval: Eval = field(default_factory=Eval)
    stop: Stop = field(default_factory=Stop)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)

    def response_tokens(self, prompt_tokens: int, *, evaluation: bool = False) -> int:
        """The limit of one response to a prompt of `prompt_tokens`; at least 1."""
        if evaluation and self.eval.max_response_tokens is not None:
            return self.eval.max_response_tokens
        total, response = self.rollout.max_total_tokens, self.rollout.max_response_tokens
        return response if total is None else max(min(response, total - prompt_tokens), 1)

    @property
    def eval_function(self) -> RewardFunction | None:
        """The one of reward.functions whose value scores an evaluation; None: the whole reward does."""
        functions = {f.label: f for f in self.reward.functions}
        return functions.get(self.eval.reward or (next(iter(functions)) if len(functions) == 1 else ""))

    @property
    def eval_verifier(self) -> Verifier | None:
        """The verifier that scores an evaluation; None: something else does."""
        f = self.eval_function
        if f is None:
            return None if self.reward.functions else self.reward.verifier
        return typing.cast(Verifier, f.path) if f.is_verifier else None

    @property
    def longest_train_tokens(self) -> int:
        """Longest sequence, prompt and response, that is trained on."""
        prompt, total = self.data.max_prompt_tokens, self.rollout.max_total_tokens
        longest = prompt + self.rollout.max_response_tokens
        return longest if total is None else min(longest, total)

    @property
    def longest_tokens(self) -> int:
        """Longest sequence, prompt and response, of training or evaluation."""
        evaluated = self.data.max_prompt_tokens + self.eval.max_response_tokens if self.eval.max_response_tokens else 0
        return max(self.longest_train_tokens, evaluated)

    @property
    def responses_per_step(self) -> int:
        return self.rollout.prompts_per_step * self.rollout.group_size

    @property
    def optimizer_steps_per_step(self) -> int:
        return self.responses_per_step // self.batch.global_batch_size


def packed_alignment(parallel: Parallel, precision: Precision) -> int:
    """What a microbatch's tokens on one rank must be a multiple of: equal parts for sequence parallelism, and FP8's
    matrix products (also of such a part alone)."""
    return (parallel.tp if parallel.sequence_parallel else 1) * (FP8_ALIGN if precision.fp8 else 1)
