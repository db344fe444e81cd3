"""What a configuration takes on named GPUs, without one: memory by part and by phase, and the smallest change that
makes it fit.

Arithmetic on the model's shapes, and the assumptions below. It has not been compared with a GPU; weights, gradients and
optimizer are compared with what Megatron allocates on a CPU (tests/plan/test_memory.py). Bytes are of one GPU, the
fullest; GB are 1e9 bytes.

    start      an engine, with a cache for one longest sequence at least: it refuses to start if that is not within its
               share of the GPU (engine.gpu_memory_frac), whatever else is free. If colocated there is no policy yet
    update     policy, gradients, optimizer, activations; a colocated engine sleeps, its weights and KV cache given back
    rollout    engine and KV cache; beside it, if colocated, what of the policy stays on the GPU between updates

Attention never holds its L x L scores (flash attention), and the head never its logits (kernels/). What FP8 layers keep
is counted as if it were bfloat16: too much.
"""

import itertools
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from grpo_mcore import entry
from grpo_mcore.config import rules
from grpo_mcore.config.config import Config, Engine, InputError, Parallel
from grpo_mcore.kernels import linear_grpo, pick, reference
from grpo_mcore.loss.loss import is_pointwise
from grpo_mcore.policy import hf_weights, model, model_folder
from grpo_mcore.policy.model import HFConfig

BENCHMARK_MODEL = Path(__file__).resolve().parents[2] / "configs/benchmarks/1.5b/config.json"
RECIPE_MODEL = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"  # whose config.json that is
GIB = 1 << 30

# Assumptions: nobody's measurement of this program.
TRAINER_OVERHEAD_BYTES = 3 * GIB  # CUDA's context, NCCL's buffers, workspaces of cuBLAS and Transformer Engine
ENGINE_OVERHEAD_BYTES = 3 * GIB  # of vLLM awake: context, CUDA graphs, the sampler's logits
ENGINE_ASLEEP_BYTES = 2 * GIB  # of vLLM asleep: context and CUDA graphs
ALLOCATOR_SLACK = 1.1  # what the caching allocator holds, over what is asked of it, of tensors that come and go


@dataclass(frozen=True)
class Gpu:
    """Of the makers' data sheets (SXM, dense, without sparsity); memory as torch.cuda reports it, a little less than
    the name says."""

    memory_bytes: float
    bf16_flops_per_s: float
    fp8_flops_per_s: float  # 0: has no FP8 matrix products
    hbm_bytes_per_s: float
    nvlink_bytes_per_s: float  # one direction


GPUS = {
    "h100-80gb": Gpu(79.1 * GIB, 989e12, 1979e12, 3.35e12, 450e9),
    "h200-141gb": Gpu(139.8 * GIB, 989e12, 1979e12, 4.8e12, 450e9),
    "a100-80gb": Gpu(79.1 * GIB, 312e12, 0, 2.04e12, 300e9),
    "a100-40gb": Gpu(39.4 * GIB, 312e12, 0, 1.555e12, 300e9),
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
class Case:
    """A configuration of a model on a machine. Raises InputError for what the three do not allow each other."""

    cfg: Config
    hf_config: HFConfig
    machine: Machine

    def __post_init__(self) -> None:
        cfg, machine, engine_gpus = self.cfg, self.machine, self.cfg.engine.num_engines * self.cfg.engine.tp
        if self.ranks < 1 or engine_gpus > machine.num_gpus:
            raise InputError(
                "engine.num_engines",
                cfg.engine.num_engines,
                f"takes {engine_gpus} of {machine.num_gpus} GPUs",
                "lower it",
            )
        cache, longest = cfg.engine.kv_cache_bytes, longest_sequence_bytes(self)
        if cache is not None and cache < longest:
            raise InputError(
                "engine.kv_cache_bytes",
                cache,
                f"must hold the longest sequence, {cfg.longest_tokens} tokens: an engine refuses to start without",
                f"set it to {math.ceil(longest)} or more",
            )
        rules.check_ranks(cfg, self.ranks)
        model.check_parallel(self.hf_config, cfg.parallel, cfg.precision)
        if cfg.precision.fp8 and not self.gpu.fp8_flops_per_s:
            raise InputError(
                "precision.fp8",
                cfg.precision.fp8,
                f"needs FP8 matrix products, which {machine.name} has not",
                "set precision.fp8=null, or take another GPU",
            )

    @property
    def gpu(self) -> Gpu:
        return self.machine.gpu

    @cached_property
    def colocated(self) -> bool:
        return self.cfg.engine.is_colocated("cuda")

    @cached_property
    def ranks(self) -> int:
        """Of the policy."""
        e = self.cfg.engine
        return self.machine.num_gpus - (0 if self.colocated else e.num_engines * e.tp)

    @property
    def dp(self) -> int:
        return self.ranks // self.cfg.parallel.ranks_per_replica

    @property
    def itemsize(self) -> int:
        """Bytes of one of the policy's numbers."""
        return _itemsize(self.cfg.precision.params)

    @property
    def engine_memory_frac(self) -> float:
        """Of a GPU's memory, for its engine."""
        return self.cfg.engine.share_of_gpu(in_turns=self.colocated)

    @property
    def offloaded(self) -> tuple[str, ...]:
        """Of the policy, while engines sample."""
        return self.cfg.engine.offload_trainer if self.colocated else ()

    @cached_property
    def num_parameters(self) -> int:
        return num_parameters(self.hf_config)

    @cached_property
    def layer_parameters(self) -> int:
        return layer_parameters(self.hf_config)

    @cached_property
    def kv_bytes_per_token(self) -> int:
        return kv_bytes_per_token(self.hf_config, self.cfg.engine)

    def changed(self, changes: dict[str, object]) -> "Case":
        return replace(self, cfg=changed(self.cfg, changes))


def layer_parameters(hf_config: HFConfig) -> int:
    """Of all layers' matrices, biases and norms left out."""
    shapes = hf_weights.shapes(hf_config).items()
    return sum(math.prod(s) for name, s in shapes if len(s) == 2 and name.startswith("model.layers."))


def _itemsize(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else 4


def num_parameters(hf_config: HFConfig, parallel: Parallel = Parallel(), stage: int = 0) -> int:
    """That one rank of a pipeline stage holds."""
    tp, total = parallel.tp, 0
    for row in hf_weights.table(hf_config, parallel):
        numbers = sum(map(math.prod, row.hf.values()))
        if row.layout is hf_weights.vocab:
            numbers = -(-hf_config.vocab_size // tp) * hf_config.hidden_size
        elif row.layout is not hf_weights.same:
            numbers //= tp
        total += numbers if row.stage == stage else 0
    if hf_config.tie_word_embeddings and parallel.pp > 1 and stage == parallel.pp - 1:  # its own copy, for the head
        total += -(-hf_config.vocab_size // tp) * hf_config.hidden_size
    return total


def kv_bytes_per_token(hf_config: HFConfig, engine: Engine) -> int:
    """Keys and values of all layers."""
    numbers = 2 * hf_config.num_hidden_layers * hf_config.num_key_value_heads * model.head_dim(hf_config)
    return numbers * (1 if engine.kv_cache_dtype == "fp8" else _itemsize(engine.dtype))


def state_bytes(case: Case, stage: int = 0) -> dict[str, float]:
    """What a policy rank holds from the first optimizer step on: Megatron's distributed optimizer, sharded over dp x
    cp."""
    cfg, numbers = case.cfg, num_parameters(case.hf_config, case.cfg.parallel, stage)
    parts = {
        "weights": numbers * case.itemsize,
        "gradients (float32)": numbers * 4,
        # float32 weights are their own main weights
        "optimizer, sharded (float32)": numbers * (12 if case.itemsize == 2 else 8) / (case.dp * cfg.parallel.cp),
    }
    if cfg.precision.fp8:
        # Quantised along rows for the forward, along columns for the backward; kept from one microbatch to the next.
        parts["FP8 copies of the layers' weights"] = 2 * case.layer_parameters / cfg.parallel.tp / cfg.parallel.pp
    if cfg.loss.kl_coef > 0:
        parts["reference policy"] = parts["weights"] + parts.get("FP8 copies of the layers' weights", 0)
    return parts


def layer_activation_bytes(case: Case) -> tuple[float, float, float]:
    """(all that a layer keeps for its backward, the MLP's part of it, its input alone), per token of a microbatch on
    one rank."""
    p, hf, size = case.cfg.parallel, case.hf_config, case.itemsize
    d, ffn = hf.hidden_size / (p.tp if p.sequence_parallel else 1), hf.intermediate_size / p.tp
    q, kv = (n * model.head_dim(hf) / p.tp for n in (hf.num_attention_heads, 2 * hf.num_key_value_heads))
    # The norm's input and output; the product, and with RoPE on it; attention's output, and the logsumexp of its scores
    attention = size * (2 * d + 2 * (q + kv) + q) + 4 * hf.num_attention_heads / p.tp
    mlp = size * (2 * d + 3 * ffn)  # the norm's input and output; gate and up, and their product
    return attention + mlp, mlp - size * d, size * d


def activation_bytes(case: Case, stage: int) -> dict[str, float]:
    """Of the update, at its fullest: the microbatches in flight, and a backward pass at work."""
    p, tokens = case.cfg.parallel, case.cfg.batch.max_tokens_per_microbatch
    layer, mlp, kept_input = layer_activation_bytes(case)
    layers = case.hf_config.num_hidden_layers // p.pp
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
        parts["head"] = ALLOCATOR_SLACK * head_bytes(case)
    return parts


def head_bytes(case: Case) -> float:
    """Hidden states to log-probs, every token a response token: the chosen rows and their gradients, and logits or
    their gradients, of a workspace; the weight's gradient where it is not added to DDP's buffer at once."""
    cfg, size, d = case.cfg, case.itemsize, case.hf_config.hidden_size
    tokens, V = cfg.batch.max_tokens_per_microbatch, -(-case.hf_config.vocab_size // cfg.parallel.tp)
    once = cfg.kernels.linear_grpo and is_pointwise(cfg.loss)
    # Triton's needs a Hopper or newer.
    plain = cfg.kernels.linear_logprob == "reference" or not case.gpu.fp8_flops_per_s
    if once:
        narrow = size if size < 4 else 0  # the gradient of a logit, beside its float32
        columns = min(linear_grpo.COLUMNS["cuda"], V)
        of_row = V * 4 + columns * (4 + narrow) if plain else V * (4 + narrow)
        limit = cfg.kernels.workspace_bytes or linear_grpo.WORKSPACE_BYTES["cuda"]
        rows = max(min(tokens, limit // (V * (4 if plain else 4 + narrow))), 1)
        workspace = rows * of_row
    elif plain:
        workspace = tokens * min(reference.CHUNK_V, V) * (8 + size)  # two float32 blocks and their product
    else:
        workspace = cfg.kernels.workspace_bytes or pick.WORKSPACE_BYTES
    # Of logits computed once it is added up in float32 first.
    of_weight = (size + (4 if once and size < 4 else 0)) * V * d if cfg.parallel.overlap_grad_reduce else 0
    return tokens * d * (3 * size + size + 4) + of_weight + workspace


def engine_weight_bytes(case: Case) -> float:
    """On one GPU; embedding, head, biases and norms are never quantised."""
    e, layers = case.cfg.engine, case.layer_parameters
    layer_bytes = layers * (1 if e.quantization else _itemsize(e.dtype))
    return (layer_bytes + _itemsize(e.dtype) * (case.num_parameters - layers)) / e.tp


def prefill_bytes(case: Case) -> float:
    """Activations of an engine step of prompts alone, on one GPU: the residual stream, a norm's output and the next
    residual, and an MLP's gate and up with their product."""
    e, hf = case.cfg.engine, case.hf_config
    return e.tokens_per_step("cuda") * _itemsize(e.dtype) * (3 * hf.hidden_size + 3 * hf.intermediate_size / e.tp)


def engine_bytes(case: Case) -> dict[str, float]:
    """On one GPU, without its cache."""
    return {
        "engine: weights": engine_weight_bytes(case),
        "engine: activations of prompts": prefill_bytes(case),
        "engine: CUDA graphs, workspaces": ENGINE_OVERHEAD_BYTES,
    }


def longest_sequence_bytes(case: Case) -> float:
    """In an engine's cache, on one GPU."""
    return case.cfg.longest_tokens * case.kv_bytes_per_token / case.cfg.engine.tp


def kv_cache_bytes(case: Case) -> float:
    """On one GPU: as configured, else what the engine's share of the GPU leaves; at least one longest sequence."""
    if case.cfg.engine.kv_cache_bytes is not None:
        return case.cfg.engine.kv_cache_bytes
    left = case.gpu.memory_bytes * case.engine_memory_frac - sum(engine_bytes(case).values())
    return max(left, longest_sequence_bytes(case))


def kv_cache_tokens(case: Case) -> float:
    """Of one engine."""
    return kv_cache_bytes(case) * case.cfg.engine.tp / case.kv_bytes_per_token


@dataclass(frozen=True)
class Memory:
    """Bytes by part, phase by phase, each of the GPU that is fullest in it."""

    phases: dict[str, dict[str, float]]
    capacity_bytes: float
    start_bytes: float  # of them, what an engine may take at its start

    def total(self, phase: str) -> float:
        return sum(self.phases[phase].values())

    def limit(self, phase: str) -> float:
        return self.start_bytes if phase == "start" else self.capacity_bytes

    @property
    def fullest(self) -> str:
        return max(self.phases, key=lambda phase: self.total(phase) / self.limit(phase))

    @property
    def fits(self) -> bool:
        return self.total(self.fullest) <= self.limit(self.fullest)


def needed(case: Case) -> Memory:
    states = {stage: state_bytes(case, stage) for stage in (0, case.cfg.parallel.pp - 1)}
    framework = {"CUDA, NCCL, workspaces": TRAINER_OVERHEAD_BYTES}
    asleep = {"engine asleep": ENGINE_ASLEEP_BYTES} if case.colocated else {}
    update = _fullest(
        {**state, **activation_bytes(case, stage), **framework, **asleep} for stage, state in states.items()
    )
    beside = {}
    if case.colocated:
        stays = _fullest(states.values()).items()
        beside = {name: size for name, size in stays if not name.startswith(case.offloaded)} | framework
    engine, cache, capacity = engine_bytes(case), case.cfg.engine.kv_cache_bytes, case.gpu.memory_bytes
    phases = {
        "start": {**engine, "engine: KV cache": cache or longest_sequence_bytes(case)},
        "update": update,
        "rollout": {**beside, **engine, "engine: KV cache": kv_cache_bytes(case)},
    }
    return Memory(phases, capacity, capacity if cache else capacity * case.engine_memory_frac)


def _fullest(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    return max(parts, key=lambda sizes: sum(sizes.values()))


def changed(cfg: Config, changes: dict[str, object]) -> Config:
    """`cfg` with other values of dotted keys. Raises InputError if the rules do not allow them."""
    for name, value in changes.items():
        section, _, field = name.partition(".")
        cfg = replace(cfg, **{section: replace(getattr(cfg, section), **{field: value})})
    rules.check(cfg)
    return cfg


def remedies(case: Case) -> Iterator[dict[str, object]]:
    """Single changes that take memory off a GPU; each may be of keys that belong together."""
    cfg, p = case.cfg, case.cfg.parallel
    if p.recompute == "none":
        yield {"parallel.recompute": "selective", "parallel.recompute_modules": ("mlp",)}
    if p.recompute != "full":
        yield {"parallel.recompute": "full"}
    for cp in (p.cp, 2 * p.cp, 4 * p.cp, 8 * p.cp):
        tokens = -(-cfg.longest_train_tokens // (cp * 128)) * 128
        changes = {} if cp == p.cp else {"parallel.cp": cp}
        if tokens < cfg.batch.max_tokens_per_microbatch:
            yield {**changes, "batch.max_tokens_per_microbatch": tokens}
    for tp in range(p.tp + 1, case.hf_config.num_key_value_heads + 1):
        yield {"parallel.tp": tp, **({} if p.sequence_parallel else {"parallel.sequence_parallel": True})}
    for pp in (2 * p.pp, 4 * p.pp):
        yield {"parallel.pp": pp}
    if cfg.engine.kv_cache_bytes is not None:
        yield {"engine.kv_cache_bytes": None}
    else:
        for percent in range(80, 0, -10):
            if percent / 100 != case.engine_memory_frac:
                yield {"engine.gpu_memory_frac": percent / 100}
    if case.colocated and set(case.offloaded) != {"gradients", "optimizer"}:
        yield {"engine.offload_trainer": ("gradients", "optimizer")}


def smallest_change(case: Case) -> dict[str, object] | None:
    """The fewest keys that make it fit, of those the ones that leave the policy's arithmetic the fastest; None if there
    are none."""
    options = list(remedies(case))
    for count in (1, 2, 3):
        found = []
        for combination in itertools.combinations(options, count):
            changes = {name: value for option in combination for name, value in option.items()}
            if len(changes) < sum(map(len, combination)):  # two values of one key
                continue
            if other := _fitting(case, changes, case.machine):
                found.append((len(changes), _slowness(other.cfg), -other.engine_memory_frac, changes))
        if found:
            return min(found, key=lambda x: x[:3])[3]
    return None


def _fitting(case: Case, changes: dict[str, object], machine: Machine) -> Case | None:
    """The case with other values of keys and on this machine, if that is possible and fits."""
    try:
        other = replace(case, cfg=changed(case.cfg, changes), machine=machine)
    except InputError:
        return None
    return other if needed(other).fits else None


def _slowness(cfg: Config) -> float:
    """Of the policy's arithmetic, roughly: recomputation, and what the axes make GPUs wait for each other."""
    p = cfg.parallel
    waits = 1 + 0.1 * (p.tp - 1) + 0.05 * (p.cp - 1) + 0.2 * (p.pp - 1)
    return {"none": 1.0, "selective": 1.15, "full": 1.33}[p.recompute] * waits


def check(case: Case) -> Memory:
    """The memory of what fits. Raises InputError with the smallest change for what does not."""
    m, machine = needed(case), case.machine
    if m.fits:
        return m
    limit = m.limit(m.fullest)
    largest = sorted(m.phases[m.fullest].items(), key=lambda part: -part[1])[:3]
    most = ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in largest)
    change = smallest_change(case)
    if change is not None:
        other = needed(case.changed(change))
        remedy = f"{overrides(change)} makes {other.total(other.fullest) / 1e9:.1f} GB"
    else:
        machines = [Machine(name, machine.num_gpus) for name, g in GPUS.items() if g.memory_bytes > m.capacity_bytes]
        larger = " or ".join(other.name for other in machines if _fitting(case, {}, other))
        larger = larger or "a smaller model or shorter sequences"
        remedy = f"no change of recomputation, microbatch and axes does; take {larger}"
    raise InputError(
        f"{m.fullest} on {machine.num_gpus} x {machine.name}",
        f"{m.total(m.fullest) / 1e9:.1f} GB",
        f"must be at most {limit / 1e9:.1f} GB, {'the GPU' if limit == m.capacity_bytes else 'its share of the GPU'}; "
        f"most of it: {most}",
        remedy,
    )


def overrides(change: dict[str, object]) -> str:
    """As arguments of the command line."""
    return " ".join(f"{name}={_as_override(value)}" for name, value in change.items())


def _as_override(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{','.join(value)}]"
    return value if isinstance(value, str) else json.dumps(value)


def machine_of(name: str | None, num_gpus: str | None) -> Machine:
    """Of the command line. Raises InputError."""
    if name not in GPUS:
        raise InputError("--gpu", name, f"must be one of {', '.join(GPUS)}", "choose one of them")
    return Machine(name, entry.whole_number("--num-gpus", num_gpus, low=1))


def hf_config_of(cfg: Config, given: str | None = None) -> HFConfig:
    """The model's config: `given`, a config.json or its folder; else cfg.model's, which for the recipe's 1.5B and what
    its stages make of it needs no network. Raises InputError."""
    if given is not None:
        return model.load_hf_config(given)
    if not Path(cfg.model).is_dir() and (cfg.model == RECIPE_MODEL or cfg.recipe is not None):
        return model.load_hf_config(str(BENCHMARK_MODEL))
    return model.load_hf_config(model_folder.config_folder(cfg.model))
