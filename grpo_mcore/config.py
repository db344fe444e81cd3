"""The run's configuration: frozen, total, strict. Every key is documented here, where it is defined.

config_file.py reads it from YAML, rules.py says what must hold between fields. Nothing writes to a Config.
"""

from dataclasses import dataclass, field
from typing import Literal

FP8_ALIGN = 16  # cuBLAS: every dimension of an FP8 matrix product is a multiple of it


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
    max_prompt_tokens: int = 1024  # longer prompts are left out, and counted


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
    fp8: Literal["delayed", "tensorwise", "blockwise"] | None = None  # Transformer Engine's recipe for the layers' matrix products
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
    timeout_s: float = 3600.0  # for all responses of a step


@dataclass(frozen=True)
class Engine:
    """vLLM. One engine is one Ray actor."""

    num_engines: int = 1
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    kv_cache_bytes: int | None = None  # null: vLLM's own choice (GPU); a CPU engine needs a number
    max_running_responses: int = 256
    num_threads: int = 1  # CPU threads of one engine
    start_timeout_s: float = 600.0
    health_timeout_s: float = 60.0  # an engine that does not answer for so long is replaced
    max_failures: int = 3  # of engines in one process's life; one more stops the run


@dataclass(frozen=True)
class Reward:
    """math-verify on the last \\boxed{} after the thinking, in processes that can be killed."""

    num_processes: int = 2
    cpu_s: float = 2.0  # CPU time of one comparison
    wall_s: float = 20.0  # wall clock of one comparison
    memory_bytes: int = 2 << 30


@dataclass(frozen=True)
class Advantage:
    baseline: Literal["mean", "leave_one_out"] = "mean"
    normalize_by_std: bool = True  # std over the same responses as the baseline


@dataclass(frozen=True)
class Loss:
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.0  # 0: no reference policy is kept
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"


@dataclass(frozen=True)
class Batch:
    global_batch_size: int = 64  # responses per optimizer step, over all ranks
    max_tokens_per_microbatch: int = 8192  # packed tokens of one forward pass on one rank


@dataclass(frozen=True)
class Refit:
    transport: Literal["auto", "broadcast", "shared"] = "auto"  # shared: memory of this machine (GPU: of the same GPU); auto: where all engines can
    bucket_bytes: int = 32 << 20  # of two
    timeout_s: float = 300.0
    canary_tolerance: float | None = None  # mean |engine - trainer| log-prob; null: 1e-3 if both are float32, else 0.15


@dataclass(frozen=True)
class Eval:
    data: str | None = None  # null: no evaluation
    every: int = 10  # steps; also before the first and after the last
    samples_per_prompt: int = 8  # k of mean@k and pass@k
    max_prompts: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    max_response_tokens: int | None = None  # null: rollout.max_response_tokens


@dataclass(frozen=True)
class Checkpoint:
    every: int = 10  # steps; also after the last; 0 keeps none
    keep: int = 2  # the newest ones
    keep_best: int = 0  # besides, those with the highest best_metric
    best_metric: str = "reward/mean"  # of metrics.jsonl, such as eval/mean@8
    asynchronous: bool = True  # written in the background while the next step runs
    timeout_s: float = 1800.0  # of one save


@dataclass(frozen=True)
class Config:
    model: str  # Hugging Face folder or hub name, a .gguf file, or package:NAME/FILE.gguf
    run_dir: str
    num_steps: int
    data: Data
    seed: int = 42
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = False  # the trainer's arithmetic on a GPU, slower; a CPU's is anyway
    num_threads: int = 1  # CPU threads of one trainer rank
    collective_timeout_s: float = 1800.0  # longest wait of a rank for the others, beyond rollout.timeout_s
    warm_start: WarmStart | None = None
    parallel: Parallel = field(default_factory=Parallel)
    precision: Precision = field(default_factory=Precision)
    kernels: Kernels = field(default_factory=Kernels)
    optimizer: Optimizer = field(default_factory=Optimizer)
    rollout: Rollout = field(default_factory=Rollout)
    engine: Engine = field(default_factory=Engine)
    reward: Reward = field(default_factory=Reward)
    advantage: Advantage = field(default_factory=Advantage)
    loss: Loss = field(default_factory=Loss)
    batch: Batch = field(default_factory=Batch)
    refit: Refit = field(default_factory=Refit)
    eval: Eval = field(default_factory=Eval)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)

    @property
    def max_total_tokens(self) -> int:
        """Longest sequence, prompt and response, of training or evaluation."""
        return self.data.max_prompt_tokens + max(self.rollout.max_response_tokens, self.eval_response_tokens)

    @property
    def eval_response_tokens(self) -> int:
        return self.eval.max_response_tokens or self.rollout.max_response_tokens

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
