"""What a configuration takes on named GPUs, without one: memory by part and by phase, and the smallest change that
makes it fit.

Arithmetic on the model's shapes, and the assumptions below. It has not been compared with a GPU; weights, gradients and
optimizer are compared with what Megatron allocates on a CPU (tests/plan/test_memory.py). Bytes are of one GPU, the
fullest; GB are 1e9 bytes.

    update     policy, gradients, optimizer, activations; a colocated engine sleeps, its weights and KV cache given back
    rollout    engine and KV cache; beside it, if colocated, what of the policy stays on the GPU between updates

Attention never holds its L x L scores (flash attention), and the head never its logits (kernels/). What FP8 layers keep
is counted as if it were bfloat16: too much.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from grpo_mcore.config import rules
from grpo_mcore.config.config import Config, InputError, Parallel
from grpo_mcore.kernels import reference
from grpo_mcore.policy import hf_weights, model

BENCHMARK_MODEL = Path(__file__).resolve().parents[2] / "configs/benchmarks/1.5b/config.json"
RECIPE_MODEL = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"  # whose config.json that is
GIB = 1 << 30

# Assumptions: nobody's measurement of this program.
TRAINER_OVERHEAD_BYTES = 3 * GIB  # CUDA's context, NCCL's buffers, workspaces of cuBLAS and Transformer Engine
ENGINE_OVERHEAD_BYTES = 4 * GIB  # of vLLM awake: context, CUDA graphs, activations of a prefill, the sampler's logits
ENGINE_ASLEEP_BYTES = 2 * GIB  # of vLLM asleep: context and CUDA graphs
ALLOCATOR_SLACK = 1.1  # what the caching allocator holds, over what is asked of it, of tensors that come and go
HEAD_WORKSPACE_BYTES = 64 << 20  # of the Triton kernel


@dataclass(frozen=True)
class Gpu:
    """Of the makers' data sheets (SXM, dense, without sparsity); memory as torch.cuda reports it, a little less than
    the name says."""

    memory_bytes: float
    bf16_flops_per_s: float
    fp8_flops_per_s: float | None  # None: has no FP8 matrix products
    hbm_bytes_per_s: float
    nvlink_bytes_per_s: float  # one direction


GPUS = {
    "h100-80gb": Gpu(79.1 * GIB, 989e12, 1979e12, 3.35e12, 450e9),
    "h200-141gb": Gpu(139.8 * GIB, 989e12, 1979e12, 4.8e12, 450e9),
    "a100-80gb": Gpu(79.1 * GIB, 312e12, None, 2.04e12, 300e9),
    "a100-40gb": Gpu(39.4 * GIB, 312e12, None, 1.555e12, 300e9),
    "b200-180gb": Gpu(178.3 * GIB, 2250e12, 4500e12, 7.7e12, 900e9),
}


@dataclass(frozen=True)
class Machine:
    name: str  # of GPUS
    num_gpus: int

    @property
    def gpu(self) -> Gpu:
        return GPUS[self.name]


@dataclass(frozen=True)
class Sharing:
    """How engines span and share GPUs: the configuration's keys for it, and what holds where it has none."""

    colocated: bool
    tp: int  # GPUs of one engine
    memory_frac: float  # of a GPU's memory, for its engine
    offloaded: tuple[str, ...]  # of the policy, while engines sample
    weight_bytes: int  # of a number of the layers' matrices
    kv_bytes: int  # of a number of the cache


def sharing(cfg: Config) -> Sharing:
    e, size = cfg.engine, 2 if cfg.engine.dtype == "bfloat16" else 4
    colocated = e.is_colocated("cuda")
    return Sharing(
        colocated,
        e.tp,
        e.gpu_memory_frac or (0.5 if colocated else 0.9),
        e.offload_trainer if colocated else (),
        1 if e.quantization else size,
        1 if e.kv_cache_dtype == "fp8" else size,
    )


@dataclass(frozen=True)
class Placement:
    """Who is on which GPUs."""

    colocated: bool
    ranks: int  # of the policy
    dp: int
    engine_tp: int  # GPUs of one engine


def placement(cfg: Config, hf_config, machine: Machine) -> Placement:
    """Raises InputError for what the GPUs, the model or each other do not allow."""
    engines = sharing(cfg)
    engine_gpus = cfg.engine.num_engines * engines.tp
    ranks = machine.num_gpus if engines.colocated else machine.num_gpus - engine_gpus
    if ranks < 1 or engine_gpus > machine.num_gpus:
        raise InputError(
            "engine.num_engines", cfg.engine.num_engines, f"takes {engine_gpus} of {machine.num_gpus} GPUs", "lower it"
        )
    rules.check_ranks(cfg, ranks)
    model.check_parallel(hf_config, cfg.parallel, cfg.precision)
    if cfg.precision.fp8 and machine.gpu.fp8_flops_per_s is None:
        raise InputError(
            "precision.fp8",
            cfg.precision.fp8,
            f"needs FP8 matrix products, which {machine.name} has not",
            "set precision.fp8=null, or take another GPU",
        )
    return Placement(engines.colocated, ranks, ranks // cfg.parallel.ranks_per_replica, engines.tp)


def num_parameters(hf_config, parallel: Parallel = Parallel(), stage: int = 0) -> int:
    """That one rank of a pipeline stage holds."""
    tp, total = parallel.tp, 0
    for row in hf_weights.table(hf_config, parallel):
        numbers = sum(_numel(shape) for shape in row.hf.values())
        if row.layout is hf_weights.vocab:
            numbers = -(-hf_config.vocab_size // tp) * hf_config.hidden_size
        elif row.layout is not hf_weights.same:
            numbers //= tp
        total += numbers if row.stage == stage else 0
    if hf_config.tie_word_embeddings and parallel.pp > 1 and stage == parallel.pp - 1:  # its own copy, for the head
        total += -(-hf_config.vocab_size // tp) * hf_config.hidden_size
    return total


def _numel(shape: tuple[int, ...]) -> int:
    out = 1
    for n in shape:
        out *= n
    return out


def kv_bytes_per_token(hf_config, itemsize: int) -> int:
    """Keys and values of all layers."""
    return 2 * hf_config.num_hidden_layers * hf_config.num_key_value_heads * model.head_dim(hf_config) * itemsize


def state_bytes(cfg: Config, hf_config, dp: int, stage: int = 0) -> dict[str, float]:
    """What a policy rank holds from the first optimizer step on: Megatron's distributed optimizer, sharded over dp x
    cp."""
    numbers = num_parameters(hf_config, cfg.parallel, stage)
    bf16 = cfg.precision.params == "bfloat16"
    parts = {
        "weights": numbers * (2 if bf16 else 4),
        "gradients (float32)": numbers * 4,
        # float32 weights are their own main weights
        "optimizer, sharded (float32)": numbers * (12 if bf16 else 8) / (dp * cfg.parallel.cp),
    }
    if cfg.precision.fp8:
        # Quantised along rows for the forward, along columns for the backward; kept from one microbatch to the next.
        parts["FP8 copies of the layers' weights"] = 2 * layer_parameters(hf_config) / cfg.parallel.tp / cfg.parallel.pp
    if cfg.loss.kl_coef > 0:
        parts["reference policy"] = parts["weights"] + parts.get("FP8 copies of the layers' weights", 0)
    return parts


def layer_parameters(hf_config) -> int:
    """Of all layers' matrices, biases and norms left out."""
    return sum(
        _numel(shape)
        for name, shape in hf_weights.shapes(hf_config).items()
        if len(shape) == 2 and name.startswith("model.layers.")
    )


def layer_activation_bytes(cfg: Config, hf_config) -> tuple[float, float, float]:
    """(all that a layer keeps for its backward, the MLP's part of it, its input alone), per token of a microbatch on
    one rank."""
    p, size = cfg.parallel, 2 if cfg.precision.params == "bfloat16" else 4
    sp = p.tp if p.sequence_parallel else 1
    d, ffn = hf_config.hidden_size / sp, hf_config.intermediate_size / p.tp
    q, kv = (
        heads * model.head_dim(hf_config) / p.tp
        for heads in (hf_config.num_attention_heads, 2 * hf_config.num_key_value_heads)
    )
    attention = (
        size
        * (
            2 * d  # the norm's input and output
            + 2 * (q + kv)  # the product, and with RoPE on it
            + q
        )
        + 4 * hf_config.num_attention_heads / p.tp
    )  # attention's output, and the logsumexp of its scores
    mlp = size * (2 * d + 3 * ffn)  # the norm's input and output; gate and up, and their product
    return attention + mlp, mlp - size * d, size * d


def activation_bytes(cfg: Config, hf_config, machine: Machine, stage: int) -> dict[str, float]:
    """Of the update, at its fullest: the microbatches in flight, and a backward pass at work."""
    p, tokens = cfg.parallel, cfg.batch.max_tokens_per_microbatch
    layer, mlp, kept_input = layer_activation_bytes(cfg, hf_config)
    layers = hf_config.num_hidden_layers // p.pp
    # 1F1B: the first stage holds as many microbatches as there are stages, the last one; interleaved, more.
    in_flight = (p.pp - stage) + ((p.pp - 1) / p.virtual_pp if p.virtual_pp > 1 else 0)
    if p.recompute == "full":
        kept, again = layers / p.recompute_num_layers * kept_input, p.recompute_num_layers * layer
    elif p.recompute == "selective" and "mlp" in p.recompute_modules:
        kept, again = layers * (layer - mlp), mlp
    else:  # selective core_attn: flash attention keeps next to nothing that could be computed again
        kept, again = layers * layer, 0.0
    parts = {
        "activations kept": ALLOCATOR_SLACK * tokens * kept * in_flight,
        # Gradients of a layer's activations, at most as large as they.
        "backward of a layer": ALLOCATOR_SLACK * tokens * (again + layer),
    }
    if stage == p.pp - 1:
        parts["head"] = ALLOCATOR_SLACK * head_bytes(cfg, hf_config, machine)
    return parts


def head_bytes(cfg: Config, hf_config, machine: Machine) -> float:
    """Hidden states to log-probs, every token a response token: the chosen rows and their gradients, the weight's
    gradient; no logits."""
    tokens, size = cfg.batch.max_tokens_per_microbatch, 2 if cfg.precision.params == "bfloat16" else 4
    d, rows = hf_config.hidden_size, -(-hf_config.vocab_size // cfg.parallel.tp)
    # Triton's needs a Hopper or newer; the plain one has two float32 blocks [tokens, chunk] and their product.
    plain = cfg.kernels.linear_logprob == "reference" or machine.gpu.fp8_flops_per_s is None
    workspace = tokens * min(_chunk_V(), rows) * (8 + size) if plain else HEAD_WORKSPACE_BYTES
    return tokens * d * (3 * size + size + 4) + size * rows * d + workspace


def _chunk_V() -> int:
    return reference.linear_logprob.__kwdefaults__["chunk_V"]


@dataclass(frozen=True)
class Memory:
    """Bytes by part, phase by phase, each of the GPU that is fullest in it."""

    phases: dict[str, dict[str, float]]
    capacity_bytes: float

    def total(self, phase: str) -> float:
        return sum(self.phases[phase].values())

    @property
    def fullest(self) -> str:
        return max(self.phases, key=self.total)

    @property
    def fits(self) -> bool:
        return self.total(self.fullest) <= self.capacity_bytes


def of(cfg: Config, hf_config, machine: Machine) -> Memory:
    """Raises InputError for a layout that cannot be."""
    at, gpu = placement(cfg, hf_config, machine), machine.gpu
    framework = {"CUDA, NCCL, workspaces": TRAINER_OVERHEAD_BYTES}
    asleep = {"engine asleep": ENGINE_ASLEEP_BYTES} if at.colocated else {}
    stages = [
        {
            **state_bytes(cfg, hf_config, at.dp, stage),
            **activation_bytes(cfg, hf_config, machine, stage),
            **framework,
            **asleep,
        }
        for stage in {0, cfg.parallel.pp - 1}
    ]
    update = max(stages, key=lambda parts: sum(parts.values()))
    states = [state_bytes(cfg, hf_config, at.dp, stage) for stage in {0, cfg.parallel.pp - 1}]
    stays = {
        name: size
        for name, size in max(states, key=lambda parts: sum(parts.values())).items()
        if not name.startswith(sharing(cfg).offloaded)
    }
    beside = {**stays, **framework} if at.colocated else {}
    engine = {
        "engine: weights": engine_weight_bytes(cfg, hf_config),
        "engine: CUDA graphs, workspaces": ENGINE_OVERHEAD_BYTES,
    }
    engine["engine: KV cache"] = kv_cache_bytes(cfg, hf_config, gpu, own=sum(engine.values()))
    return Memory({"update": update, "rollout": {**beside, **engine}}, gpu.memory_bytes)


def engine_weight_bytes(cfg: Config, hf_config) -> float:
    """On one GPU; embedding, head, biases and norms are never quantised."""
    e, quantised = sharing(cfg), layer_parameters(hf_config)
    return (
        e.weight_bytes * quantised
        + (2 if cfg.engine.dtype == "bfloat16" else 4) * (num_parameters(hf_config) - quantised)
    ) / e.tp


def kv_cache_bytes(cfg: Config, hf_config, gpu: Gpu, *, own: float) -> float:
    """On one GPU: as configured, else what the engine's share of the GPU leaves; at least one longest sequence."""
    if cfg.engine.kv_cache_bytes is not None:
        return cfg.engine.kv_cache_bytes
    e = sharing(cfg)
    return max(
        gpu.memory_bytes * e.memory_frac - own, cfg.longest_tokens * kv_bytes_per_token(hf_config, e.kv_bytes) / e.tp
    )


def changed(cfg: Config, changes: dict[str, object]) -> Config:
    """`cfg` with other values of dotted keys. Raises InputError if the rules do not allow them."""
    for name, value in changes.items():
        section, _, field = name.partition(".")
        cfg = replace(cfg, **{section: replace(getattr(cfg, section), **{field: value})})
    rules.check(cfg)
    return cfg


def remedies(cfg: Config, hf_config) -> Iterator[dict[str, object]]:
    """Single changes that take memory off a GPU; each may be of keys that belong together."""
    p = cfg.parallel
    if p.recompute == "none":
        yield {"parallel.recompute": "selective", "parallel.recompute_modules": ("mlp",)}
    if p.recompute != "full":
        yield {"parallel.recompute": "full"}
    least = cfg.longest_train_tokens
    for cp in (p.cp, 2 * p.cp, 4 * p.cp, 8 * p.cp):
        tokens = -(-least // (cp * 128)) * 128
        changes = {} if cp == p.cp else {"parallel.cp": cp}
        if tokens < cfg.batch.max_tokens_per_microbatch:
            yield {**changes, "batch.max_tokens_per_microbatch": tokens}
    for tp in range(p.tp + 1, hf_config.num_key_value_heads + 1):
        yield {"parallel.tp": tp, **({} if p.sequence_parallel else {"parallel.sequence_parallel": True})}
    for pp in (2 * p.pp, 4 * p.pp):
        yield {"parallel.pp": pp}
    if cfg.engine.kv_cache_bytes is not None:
        yield {"engine.kv_cache_bytes": None}
    elif hasattr(cfg.engine, "gpu_memory_frac"):
        for percent in range(80, 0, -10):
            if percent / 100 < sharing(cfg).memory_frac:
                yield {"engine.gpu_memory_frac": percent / 100}
    if (
        hasattr(cfg.engine, "offload_trainer")
        and sharing(cfg).colocated
        and set(sharing(cfg).offloaded) != {"gradients", "optimizer"}
    ):
        yield {"engine.offload_trainer": ("gradients", "optimizer")}


def smallest_change(cfg: Config, hf_config, machine: Machine) -> dict[str, object] | None:
    """The fewest keys that make it fit, of those the ones that leave the policy's arithmetic the fastest; None if there
    are none."""
    options = list(remedies(cfg, hf_config))
    for count in (1, 2, 3):
        found = []
        for combination in itertools.combinations(options, count):
            changes = {name: value for option in combination for name, value in option.items()}
            if len(changes) < sum(map(len, combination)):  # two values of one key
                continue
            try:
                other = changed(cfg, changes)
                if of(other, hf_config, machine).fits:
                    found.append((len(changes), _slowness(other), -sharing(other).memory_frac, changes))
            except InputError:
                continue
        if found:
            return min(found, key=lambda x: x[:3])[3]
    return None


def _slowness(cfg: Config) -> float:
    """Of the policy's arithmetic, roughly: recomputation, and what the axes make GPUs wait for each other."""
    p = cfg.parallel
    return {"none": 1.0, "selective": 1.15, "full": 1.33}[p.recompute] * (
        1 + 0.1 * (p.tp - 1) + 0.05 * (p.cp - 1) + 0.2 * (p.pp - 1)
    )


def check(cfg: Config, hf_config, machine: Machine) -> Memory:
    """The memory of what fits. Raises InputError with the smallest change for what does not."""
    m = of(cfg, hf_config, machine)
    if m.fits:
        return m
    phase = m.fullest
    largest = sorted(m.phases[phase].items(), key=lambda part: -part[1])[:3]
    change = smallest_change(cfg, hf_config, machine)
    if change is not None:
        remedy = (
            f"{overrides(change)} makes "
            f"{max(map(of(changed(cfg, change), hf_config, machine).total, m.phases)) / 1e9:.1f} GB"
        )
    else:
        larger = [
            name
            for name, gpu in GPUS.items()
            if gpu.memory_bytes > machine.gpu.memory_bytes and _fits(cfg, hf_config, Machine(name, machine.num_gpus))
        ]
        remedy = (
            f"no change of recomputation, microbatch and axes does; take "
            f"{' or '.join(larger) or 'a smaller model or shorter sequences'}"
        )
    raise InputError(
        f"{phase} on {machine.num_gpus} x {machine.name}",
        f"{m.total(phase) / 1e9:.1f} GB",
        f"must be at most the GPU's {m.capacity_bytes / 1e9:.1f} GB; most of it: "
        f"{', '.join(f'{name} {size / 1e9:.1f} GB' for name, size in largest)}",
        remedy,
    )


def _fits(cfg: Config, hf_config, machine: Machine) -> bool:
    try:
        return of(cfg, hf_config, machine).fits
    except InputError:
        return False


def overrides(change: dict[str, object]) -> str:
    """As arguments of the command line."""
    return " ".join(f"{name}={_as_override(value)}" for name, value in change.items())


def _as_override(value: object) -> str:
    return (
        f"[{','.join(value)}]"
        if isinstance(value, tuple)
        else "null"
        if value is None
        else str(value).lower()
        if isinstance(value, bool)
        else str(value)
    )


def machine_of(name: str | None, num_gpus: str | None) -> Machine:
    """Of the command line. Raises InputError."""
    if name not in GPUS:
        raise InputError("--gpu", name, f"must be one of {', '.join(GPUS)}", "choose one of them")
    if not (num_gpus or "").isdecimal() or int(num_gpus) < 1:
        raise InputError(
            "--num-gpus",
            num_gpus,
            "must be a number of GPUs, 1 or more",
            "give the number of all nodes' GPUs, such as 8",
        )
    return Machine(name, int(num_gpus))


def hf_config_of(cfg: Config, given: str | None):
    """The model's config: `given`, a config.json or its folder; else cfg.model's, which for the recipe's 1.5B and what
    its stages make of it needs no network. Raises InputError."""
    if given is not None:
        return model.load_hf_config(given)
    if not Path(cfg.model).is_dir() and (cfg.model == RECIPE_MODEL or cfg.recipe is not None):
        return model.load_hf_config(str(BENCHMARK_MODEL))
    return model.load_hf_config(hf_weights.local_folder(cfg.model))
