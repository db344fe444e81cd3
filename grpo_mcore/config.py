"""The run's configuration: frozen, total, strict.

Parsed once from YAML plus dotted overrides; unknown keys are refused with a suggestion; values are coerced by the field's
type (PyYAML reads `1e-6` as a string); rules between fields are checked here, rules that need the model or the
data where those are opened. Nothing writes to a Config after `load`.
"""

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml


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
    bucket_bytes: int = 64 << 20
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


class _Loader(yaml.SafeLoader):
    """A key written twice in one mapping is an error: YAML would let the last one win."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise InputError(str(key), "twice", "is written twice in one section", "keep one of them")
        return super().construct_mapping(node, deep)


def load(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Config from a YAML file and `key.sub=value` overrides (values in YAML). Raises InputError."""
    path = Path(path)
    if not path.is_file():
        raise InputError("--cfg", str(path), "there is no such file", "give the path of a YAML file, such as configs/quickstart.yaml")
    try:
        tree = yaml.load(path.read_text(), _Loader)
    except yaml.YAMLError as e:
        raise InputError("--cfg", str(path), f"is not valid YAML ({' '.join(str(e).split())})", "mend the line it names") from e
    if not isinstance(tree, dict):
        raise InputError("--cfg", str(path), "must hold a mapping of keys", "see configs/quickstart.yaml")
    for override in overrides:
        dotted, eq, text = override.partition("=")
        if not eq or not dotted:
            raise InputError("override", override, "must read key.sub=value", "write it without spaces around '='")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text  # a string with YAML's own characters in it
        _section(tree, dotted)[dotted.rpartition(".")[2]] = value
    config = _build(Config, tree, "")
    check(config)
    return config


def _section(tree: dict, dotted: str) -> dict:
    """The mapping that holds the last key of `dotted`; made where it is missing."""
    node = tree
    for key in dotted.split(".")[:-1]:
        if node.get(key) is None:
            node[key] = {}
        node = node[key]
        if not isinstance(node, dict):
            raise InputError("override", dotted, f"{key!r} is a value, not a section", "name a key of the configuration")
    return node


def _build(cls: type, tree: dict, prefix: str):
    """Dataclass `cls` from a mapping, recursively."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in tree:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            remedy = f"did you mean {prefix}{near[0]}" if near else f"known keys here: {', '.join(fields)}"
            raise InputError(f"{prefix}{key}", tree[key], "there is no such key", remedy)
    hints = typing.get_type_hints(cls)
    values = {}
    for name, f in fields.items():
        if name in tree:
            values[name] = _coerce(hints[name], tree[name], prefix + name)
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise InputError(prefix + name, None, "is required", f"add `{name}:` to the configuration")
    return cls(**values)


def _coerce(hint, value, name: str):
    """`value` as the field's type, or InputError."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    if value is None and types.NoneType in options:
        return None
    kind = next(o for o in options if o is not types.NoneType)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise InputError(name, value, "must be a section of keys", f"write its keys below `{name}:`")
        return _build(kind, value, name + ".")
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
            raise InputError(name, value, "must be a list of names", "write it as [one, two]")
        return tuple(value)
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise InputError(name, value, f"must be one of {', '.join(map(str, typing.get_args(kind)))}", "choose one of them")
        return value
    wrong = InputError(name, value, f"must be of type {kind.__name__}", f"write a value of type {kind.__name__}")
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            raise wrong from None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise wrong
    return value


_POSITIVE = """num_steps num_threads collective_timeout_s data.max_prompt_tokens parallel.tp parallel.pp
parallel.virtual_pp parallel.cp parallel.ep parallel.recompute_num_layers precision.fp8_amax_history optimizer.lr rollout.prompts_per_step
rollout.group_size rollout.temperature rollout.max_response_tokens rollout.timeout_s engine.num_engines
engine.max_running_responses engine.num_threads engine.start_timeout_s engine.health_timeout_s reward.num_processes reward.cpu_s reward.wall_s
reward.memory_bytes batch.global_batch_size batch.max_tokens_per_microbatch refit.bucket_bytes refit.timeout_s eval.every
eval.samples_per_prompt eval.max_prompts eval.max_response_tokens engine.kv_cache_bytes eval.temperature eval.top_p checkpoint.keep checkpoint.timeout_s warm_start.batch_size warm_start.lr warm_start.max_steps""".split()
_NOT_NEGATIVE = """loss.kl_coef loss.clip_low loss.clip_high optimizer.warmup_steps optimizer.weight_decay optimizer.clip_grad checkpoint.every checkpoint.keep_best engine.max_failures
precision.fp8_first_layers_bf16 precision.fp8_last_layers_bf16""".split()
_FRACTIONS = "loss.clip_low eval.top_p optimizer.beta1 optimizer.beta2 optimizer.warmup_start_frac warm_start.corrupted_frac warm_start.stop_at_pass_rate".split()


def check(config: Config) -> None:
    """The rules within and between fields that need neither model nor data nor ranks."""
    rules = (
        (_POSITIVE, lambda v: 0 < v < math.inf, "greater than 0"),
        (_NOT_NEGATIVE, lambda v: 0 <= v < math.inf, "0 or more"),
        (_FRACTIONS, lambda v: 0 <= v <= 1, "between 0 and 1"),
    )
    for names, ok, words in rules:
        for name in names:
            value = config
            for key in name.split("."):
                value = None if value is None else getattr(value, key)
            if value is not None and not ok(value):
                raise InputError(name, value, f"must be {words}", "raise it" if value <= 0 else "lower it")
    if config.rollout.group_size < 2:
        raise InputError("rollout.group_size", config.rollout.group_size, "a group needs 2 responses to compare", "set it to 2 or more")
    if config.responses_per_step % config.batch.global_batch_size:
        raise InputError(
            "batch.global_batch_size", config.batch.global_batch_size,
            f"must divide the {config.responses_per_step} responses of a step (rollout.prompts_per_step x rollout.group_size)",
            "choose a divisor")
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    align, cp = packed_alignment(config.parallel, config.precision), config.parallel.cp
    needed = -(-longest // (cp * align * (2 if cp > 1 else 1))) * align * (2 if cp > 1 else 1)  # a rank's share of it, padded
    if needed > config.batch.max_tokens_per_microbatch:
        share = "" if needed == longest else f"; with its padding {needed} on each of {cp} context ranks"
        raise InputError(
            "batch.max_tokens_per_microbatch", config.batch.max_tokens_per_microbatch,
            f"must hold the longest sequence, {longest} tokens (data.max_prompt_tokens + rollout.max_response_tokens){share}",
            f"set it to {needed} or more, or shorten the sequences")
    if config.reward.cpu_s > config.reward.wall_s:
        raise InputError("reward.wall_s", config.reward.wall_s, f"must be reward.cpu_s = {config.reward.cpu_s} or more: a process has no more CPU time than clock time", "raise it")
    c, e = config.checkpoint, config.eval
    if c.keep_best and c.best_metric.startswith("eval/") and (e.data is None or c.every % e.every):
        raise InputError("checkpoint.best_metric", c.best_metric, f"is known of a checkpoint only if eval.every = {e.every} divides checkpoint.every = {c.every}, and eval.data is given",
                         "change one of them")
    _check_parallel(config.parallel)
    check_device(config, config.device)
    if "{problem}" not in config.data.prompt_template:
        raise InputError("data.prompt_template", config.data.prompt_template, "must contain {problem}", "add it where the problem goes")


def _check_parallel(p: Parallel) -> None:
    if p.ep > 1:
        raise InputError("parallel.ep", p.ep, "expert parallelism is not built: the model families here are dense", "leave it at 1")
    if p.sequence_parallel and p.tp == 1:
        raise InputError("parallel.sequence_parallel", True, "splits what tp ranks would each hold whole, and parallel.tp is 1", "raise parallel.tp, or set it to false")
    if p.virtual_pp > 1 and p.pp == 1:
        raise InputError("parallel.virtual_pp", p.virtual_pp, "cuts a pipeline stage into chunks, and parallel.pp is 1", "raise parallel.pp, or set it to 1")
    if p.overlap_param_gather and not p.overlap_grad_reduce:
        raise InputError("parallel.overlap_param_gather", True, "needs parallel.overlap_grad_reduce", "set both, or neither")
    known = ("core_attn", "mlp")
    for name in p.recompute_modules:
        if name not in known:
            raise InputError("parallel.recompute_modules", name, f"must be of {', '.join(known)}", "choose among them")


def check_device(config: Config, device: str) -> None:
    """The rules between the configuration and `device`; auto: not known yet."""
    p, kernel = config.precision, config.kernels.linear_logprob
    if kernel == "triton" and device == "cpu":
        raise InputError("kernels.linear_logprob", kernel, "needs a GPU, and this is a CPU", "set it to auto, or run on a GPU")
    if p.fp8 is None:
        return
    if p.params != "bfloat16":
        raise InputError("precision.fp8", p.fp8, f"needs precision.params = bfloat16, which is {p.params}", "change one of them")
    if device == "cpu":
        raise InputError("precision.fp8", p.fp8, "needs a GPU with FP8 matrix products (Hopper or newer), and this is a CPU", "set precision.fp8=null, or run on a GPU")
    if p.fp8 == "delayed" and (p.fp8_first_layers_bf16 or p.fp8_last_layers_bf16):
        raise InputError("precision.fp8", p.fp8, "cannot leave single layers in bfloat16: its scales are kept for the whole model",
                         "set fp8_first_layers_bf16 and fp8_last_layers_bf16 to 0, or choose tensorwise or blockwise")


def packed_alignment(parallel: Parallel, precision: Precision) -> int:
    """What a microbatch's tokens on one rank must be a multiple of: equal parts for sequence parallelism, and FP8's
    matrix products (also of such a part alone)."""
    return (parallel.tp if parallel.sequence_parallel else 1) * (FP8_ALIGN if precision.fp8 else 1)


def check_ranks(config: Config, world_size: int) -> None:
    """The rules between the configuration and the number of ranks."""
    p = config.parallel
    if world_size % p.ranks_per_replica:
        name = max(("tp", "pp", "cp"), key=lambda axis: getattr(p, axis))
        raise InputError(f"parallel.{name}", getattr(p, name), f"tp {p.tp} x pp {p.pp} x cp {p.cp} must divide the number of ranks, {world_size}", "change an axis or --nproc-per-node")
    dp = world_size // p.ranks_per_replica
    least = dp * (p.pp if p.virtual_pp > 1 else 1)
    if config.batch.global_batch_size % least:
        each = f"the {dp} data-parallel ranks" + (f" x the {p.pp} pipeline stages, which are interleaved" if p.virtual_pp > 1 else "")
        raise InputError("batch.global_batch_size", config.batch.global_batch_size, f"must be a multiple of {each}", "change one of them")


def describe(config: Config, world_size: int) -> str:
    """The resolved configuration as YAML, then the derived sizes with their units."""
    p = config.parallel
    sizes = {
        "responses per step": f"{config.responses_per_step} responses ({config.rollout.prompts_per_step} prompts x {config.rollout.group_size})",
        "responses per optimizer step": f"{config.batch.global_batch_size} responses (over all ranks)",
        "optimizer steps per step": f"{config.optimizer_steps_per_step} optimizer steps",
        "tokens per microbatch": f"at most {config.batch.max_tokens_per_microbatch} tokens (per data-parallel rank)",
        "longest sequence": f"{config.max_total_tokens} tokens (prompt and response)",
        "optimizer steps of the run": f"{config.num_steps * config.optimizer_steps_per_step} optimizer steps ({config.num_steps} steps)",
        "ranks by axis": f"tp {p.tp} x cp {p.cp} x pp {p.pp} x dp {world_size // p.ranks_per_replica} = {world_size} ranks; {config.engine.num_engines} engines",
    }
    width = max(map(len, sizes))
    return to_yaml(config) + "\n# derived\n" + "\n".join(f"# {k:{width}}  {v}" for k, v in sizes.items())


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)
