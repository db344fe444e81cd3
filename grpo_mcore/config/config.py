"""The run's configuration: frozen, total, strict. Every key is documented here, where it is defined.

file.py reads it from YAML, rules.py says what must hold between fields. Nothing writes to a Config.
"""

from dataclasses import dataclass, field
from typing import Literal

FP8_ALIGN = 16  # cuBLAS: every dimension of an FP8 matrix product is a multiple of it
EXPONENT_LIMIT = 20.0  # log-ratios are clamped to +- this before exp: of the loss, and a term of every recipe


class InputError(Exception):
    """What a user got wrong, in one line: field, value seen, constraint, remedy. Shown without a traceback."""

    def __init__(self, name: str, value: object, constraint: str, remedy: str):
        super().__init__(f"{name} = {value!r}: {constraint}. Remedy: {remedy}.")


@dataclass(frozen=True)
class Data:
    """Where prompts come from: a .jsonl or .parquet file, a hub data set, or `arithmetic:TASK` (see arithmetic.py)."""

    train: str
    problem_key: str = "problem"
    answer_key: str = "answer"
    prompt_template: str = "{problem}"  # `{problem}` is replaced; every other brace is literal
    chat_template: bool = True  # wrap the text as the user's turn in the tokenizer's chat template
    max_prompt_tokens: int = 1024  # longer prompts are over-long
    # left out, or kept in their place, cut to max_prompt_tokens, without a loss
    overlong_prompts: Literal["filter", "mask"] = "filter"
    shuffle_seed: int | None = None  # of the prompts' order; null: seed
    skip_prompts: int = 0  # of that order, at the start: those that former stages trained on


@dataclass(frozen=True)
class WarmStart:
    """The supervised pass that makes `model` where it does not exist: a tiny Qwen2 on arithmetic demonstrations."""

    task: Literal["two_digit_sums"]
    corrupted_frac: float = 0.4  # demonstrations whose final answer is wrong: leaves GRPO something to learn
    batch_size: int = 64  # demonstrations per optimizer step
    lr: float = 2e-3
    stop_at_pass_rate: float = 0.3  # mean probability of the right demonstration on held-out problems
    max_steps: int = 450


@dataclass(frozen=True)
class Parallel:
    """Sizes of the axes; data parallel is what remains of the ranks, and shards the optimizer."""

    tp: int = 1  # tensor parallel
    pp: int = 1  # pipeline stages
    virtual_pp: int = 1  # model chunks of one stage; above 1 the schedule is interleaved
    cp: int = 1  # context parallel
    ep: int = 1  # expert parallel: not built, only 1
    sequence_parallel: bool = False  # split activations by tokens between tp's matrix products
    overlap_grad_reduce: bool = False  # reduce gradients during the backward pass
    overlap_param_gather: bool = False  # gather updated weights during the next forward pass
    recompute: Literal["none", "selective", "full"] = "none"  # activations, in the backward pass
    recompute_modules: tuple[str, ...] = ("core_attn",)  # of selective: core_attn, mlp
    recompute_num_layers: int = 1  # of full: layers between two kept activations

    @property
    def ranks_per_replica(self) -> int:
        """Ranks that one copy of the model takes."""
        return self.tp * self.pp * self.cp


@dataclass(frozen=True)
class Precision:
    """The head, the norms, the residual stream and the optimizer never run in FP8."""

    params: Literal["float32", "bfloat16"] = "bfloat16"  # bfloat16 keeps float32 main weights in the optimizer
    # Transformer Engine's recipe for the layers' matrix products
    fp8: Literal["delayed", "tensorwise", "blockwise"] | None = None
    fp8_format: Literal["hybrid", "e4m3"] = "hybrid"  # hybrid: gradients in e5m2
    fp8_amax_history: int = 1024  # of delayed: steps whose largest value sets the scale
    fp8_first_layers_bf16: int = 0  # layers at the start that stay in bfloat16
    fp8_last_layers_bf16: int = 0  # layers at the end


@dataclass(frozen=True)
class Kernels:
    """Which form a kernel has. auto: Triton's on CUDA, plain PyTorch elsewhere."""

    linear_logprob: Literal["auto", "reference", "triton"] = "auto"  # hidden states to log-prob and entropy


@dataclass(frozen=True)
class Optimizer:
    lr: float = 1e-6
    lr_schedule: Literal["constant", "linear"] = "constant"  # linear: from lr to 0 over num_steps
    warmup_steps: int = 0  # steps over which lr rises from warmup_start_frac * lr
    warmup_start_frac: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_grad: float = 1.0  # global norm; 0 switches it off


@dataclass(frozen=True)
class Rollout:
    prompts_per_step: int = 128
    group_size: int = 8  # responses per prompt
    temperature: float = 1.0
    max_response_tokens: int = 7168
    max_staleness: int = 0  # steps by which sampling may run ahead of training; 0: they take turns
    # keys and values of running responses, which are of the old weights
    cache_after_refit: Literal["recompute", "keep"] = "recompute"
    dynamic_sampling: bool = False  # a group without variance in its rewards is replaced by another prompt's
    # of dynamic sampling: prompts drawn for one step, as a multiple of prompts_per_step; then such groups are kept
    max_draws: float = 3.0
    oversampling_frac: float = 0.0  # of dynamic sampling: prompts drawn ahead of need, likewise
    keep_texts: int = 4  # groups per step whose texts are kept in RUN/rollouts
    max_total_tokens: int | None = None  # prompt and response together; null: no limit but their own
    timeout_s: float = 3600.0  # for all responses of a step


@dataclass(frozen=True)
class Engine:
    """vLLM. One engine is one Ray actor."""

    num_engines: int = 1
    # colocated: on the trainers' GPUs, in turns; disaggregated: on GPUs of their own; auto: cpu, or colocated
    placement: Literal["auto", "cpu", "colocated", "disaggregated"] = "auto"
    tp: int = 1  # GPUs (CPU: processes) of one engine, on one machine
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    # of the engine's weights, as each refit delivers them
    quantization: Literal["fp8_per_tensor", "fp8_per_block"] | None = None
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    kv_cache_bytes: int | None = None  # null: what gpu_memory_frac leaves (GPU); a CPU engine needs a number
    gpu_memory_frac: float | None = None  # of a GPU's memory, for an engine; null: 0.5 colocated, 0.9 disaggregated
    max_running_responses: int = 256
    max_batched_tokens: int | None = None  # of one engine step; null: vLLM's own choice
    prefix_caching: bool = True  # siblings share the keys and values of their prompt
    enforce_eager: bool = False  # no compiled graphs; a CPU engine never has them
    # of colocated: what leaves the GPU while engines sample
    offload_trainer: tuple[str, ...] = ("gradients", "optimizer")
    num_threads: int = 1  # CPU threads of one engine
    cores: tuple[int, ...] = ()  # CPU cores that the engines are bound to, num_threads each in turn; empty: any
    start_timeout_s: float = 600.0
    health_timeout_s: float = 60.0  # an engine that does not answer for so long is replaced
    max_failures: int = 3  # of engines in one process's life; one more stops the run

    def is_colocated(self, device: str) -> bool:
        """Whether engines and trainers of this device (cpu, cuda) take turns on it."""
        return device == "cuda" and self.placement in ("auto", "colocated")


@dataclass(frozen=True)
class Reward:
    """The last \\boxed{} after the thinking against the answer, in processes that can be killed."""

    # boxed: the rules of the original DeepScaleR run (boxed_answer.py)
    verifier: Literal["math_verify", "boxed"] = "math_verify"
    require_think: bool = False  # a response without </think> has no answer
    # ask the other one too: the metric reward/disagree counts what they judge differently, and RUN/rollouts has both
    # verdicts
    compare_verifiers: bool = False
    num_processes: int = 2
    cpu_s: float = 2.0  # CPU time of one comparison
    wall_s: float = 20.0  # wall clock of one comparison
    memory_bytes: int = 2 << 30


@dataclass(frozen=True)
class Shaping:
    """What is added to the rewards before the advantages. The metrics reward/* and evaluations are of the grader's
    rewards alone."""

    # the last tokens before rollout.max_response_tokens, over which a penalty grows linearly from 0; 0: none
    overlong_buffer_tokens: int = 0
    overlong_penalty: float = 1.0  # at the limit


@dataclass(frozen=True)
class Advantage:
    baseline: Literal["mean", "leave_one_out"] = "mean"
    normalize_by_std: bool = True  # std over the same responses as the baseline


@dataclass(frozen=True)
class Loss:
    """Formulas and sources stand in loss.py; aggregation and skip_truncated in batch.py."""

    policy_loss: Literal["ppo_clip", "gspo", "cispo"] = "ppo_clip"
    clip_low: float = 0.2
    clip_high: float = 0.2
    clip_dual: float | None = None  # bound of the ratio where the advantage is negative; null: none
    kl_coef: float = 0.0  # 0: no reference policy is kept
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_limit: float | None = None  # a token's estimate is clamped to +-kl_limit; null: it is not
    entropy_coef: float = 0.0  # of the entropy bonus
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    # responses that hit the length limit have no loss; in their group's advantages they count
    skip_truncated: bool = False
    # correct for what sampled: exp(old - rollout), of a token or a response's product
    importance_level: Literal["none", "token", "sequence"] = "none"
    importance_cap: float = 2.0
    # weights above the cap become the cap; those outside [1 / cap, cap] become 0
    importance_mode: Literal["truncate", "mask"] = "truncate"


@dataclass(frozen=True)
class Batch:
    global_batch_size: int = 64  # responses per optimizer step, over all ranks
    max_tokens_per_microbatch: int = 8192  # packed tokens of one forward pass on one rank


@dataclass(frozen=True)
class Refit:
    # shared: memory of this machine (GPU: of the same GPU); auto: where all engines can
    transport: Literal["auto", "broadcast", "shared"] = "auto"
    bucket_bytes: int | None = None  # null: 8 MiB on a CPU, 256 MiB on a GPU
    timeout_s: float = 300.0
    canary_tolerance: float | None = None  # mean |engine - trainer| log-prob; null: 1e-3 if both are float32, else 0.15


@dataclass(frozen=True)
class Mismatch:
    """Bounds of mismatch/logprob_abs_mean: what an engine sampled with against what the trainer scores. Null: no
    bound."""

    warn_above: float | None = 0.1
    stop_above: float | None = None


@dataclass(frozen=True)
class Eval:
    data: str | None = None  # null: no evaluation
    every: int = 10  # steps; also before the first and after the last
    samples_per_prompt: int = 8  # k of mean@k and pass@k
    max_prompts: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    max_response_tokens: int | None = None  # null: as in training, rollout.max_total_tokens included


@dataclass(frozen=True)
class Checkpoint:
    every: int = 10  # steps; also after the last; 0 keeps none
    keep: int = 2  # the newest ones
    keep_best: int = 0  # besides, those with the highest best_metric
    best_metric: str = "reward/mean"  # of metrics.jsonl, such as eval/mean@8
    # another run's checkpoint, whose weights and optimizer a run begins with; null: `model`'s, and a fresh optimizer
    start_from: str | None = None
    asynchronous: bool = True  # written in the background while the next step runs
    timeout_s: float = 1800.0  # of one save


@dataclass(frozen=True)
class Stop:
    """Ends a run before num_steps, after the first step whose metrics show one of two signs (stop.py). Null: not looked
    for."""

    after_steps: int = 0  # none is looked for before so many
    # plateau: the mean of plateau_metric's last values, so many, is compared with that of as many before
    plateau_window: int | None = None
    plateau_metric: str = "reward/mean"  # of metrics.jsonl, such as eval/mean@16
    plateau_min_gain: float = 0.0  # and has not risen by more than this
    truncated_above: float | None = None  # rollout/truncated_frac is above this ...
    truncated_steps: int = 10  # ... in each of the last steps, so many


@dataclass(frozen=True)
class Config:
    model: str  # Hugging Face folder or hub name, a .gguf file, or package:NAME/FILE.gguf
    run_dir: str
    num_steps: int
    data: Data
    seed: int = 42
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = False  # arithmetic of trainer and engines on a GPU, slower; a CPU's is anyway
    num_threads: int = 1  # CPU threads of one trainer rank
    collective_timeout_s: float = 1800.0  # longest wait of a rank for the others, beyond rollout.timeout_s
    # what this follows, see recipe.py
    recipe: Literal["guide/8k", "guide/16k", "guide/24k", "original/8k", "original/16k", "original/24k"] | None = None
    recipe_deviations: tuple[str, ...] = ()  # the quantities of that recipe in which this deviates on purpose
    warm_start: WarmStart | None = None
    parallel: Parallel = field(default_factory=Parallel)
    precision: Precision = field(default_factory=Precision)
    kernels: Kernels = field(default_factory=Kernels)
    optimizer: Optimizer = field(default_factory=Optimizer)
    rollout: Rollout = field(default_factory=Rollout)
    engine: Engine = field(default_factory=Engine)
    reward: Reward = field(default_factory=Reward)
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
