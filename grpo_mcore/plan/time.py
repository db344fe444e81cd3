"""How long a step of a configuration takes on named GPUs, phase by phase: arithmetic and the assumptions below,
compared with no GPU.

    rollout    decoding reads the weights and the running responses' KV cache for each token of each: it waits for
               memory, until so many run that it waits for arithmetic. The step's longest response sets a floor: its
               tokens come one by one
    logprob    a forward pass over all sequences; another of the reference policy's
    update     forward, backward (2 x) and what is recomputed; tp's messages; the gradients' and the weights' way over
               data ranks
    refit      the weights, once to each engine
Reward, data and evaluation are not in it.
"""

import math
from dataclasses import dataclass

from grpo_mcore.config.config import Config
from grpo_mcore.plan import memory
from grpo_mcore.plan.memory import Case, layer_parameters
from grpo_mcore.policy import model
from grpo_mcore.policy.model import HFConfig

PROMPT_TOKENS = 192  # mean, where nothing is known of them


@dataclass(frozen=True)
class Assumptions:
    prompt_tokens: float  # mean
    response_tokens: float  # mean
    train_mfu: float = 0.40  # of the peak, matrix products of forward and backward
    fp8_mfu: float = 0.30  # of the FP8 peak: quantisation and the norms between weigh more
    decode_bandwidth_frac: float = 0.60  # of the memory's
    decode_mfu: float = 0.40
    decode_fixed_s: float = 0.004  # of each token of an engine, whatever its load: launches, sampling, scheduling
    link_frac: float = 0.70  # of NVLink's bandwidth, or the network's
    network_bytes_per_s: float = 50e9  # of one GPU between nodes of 8

    @property
    def tokens(self) -> float:
        """Of a sequence, mean."""
        return self.prompt_tokens + self.response_tokens

    @property
    def running_tokens(self) -> float:
        """Of a running response and its prompt, mean."""
        return self.prompt_tokens + self.response_tokens / 2

    def __str__(self) -> str:
        return (
            f"responses of {self.response_tokens:g} tokens after prompts of {self.prompt_tokens:g} on average, the "
            f"longest at the limit; "
            f"{self.train_mfu:.0%} of the bfloat16 peak in training ({self.fp8_mfu:.0%} of FP8's); decoding at "
            f"{self.decode_bandwidth_frac:.0%} of the memory's "
            f"bandwidth and {self.decode_mfu:.0%} of the peak, with {1000 * self.decode_fixed_s:g} ms a token of "
            f"an engine besides; {self.link_frac:.0%} of NVLink, "
            f"or of {self.network_bytes_per_s / 1e9:g} GB/s a GPU between nodes of 8"
        )


def assumed(cfg: Config, prompt_tokens: float | None, response_tokens: float | None) -> Assumptions:
    """None: not known; responses then reach half of their limit."""
    prompt = prompt_tokens or min(PROMPT_TOKENS, cfg.data.max_prompt_tokens)
    return Assumptions(float(prompt), float(response_tokens or cfg.response_tokens(int(prompt)) / 2))


def times(case: Case, a: Assumptions) -> dict[str, float]:
    """Seconds of a step, by phase."""
    cfg, gpu = case.cfg, case.gpu
    link = a.link_frac * (gpu.nvlink_bytes_per_s if case.machine.num_gpus <= 8 else a.network_bytes_per_s)
    forward = _forward_s(case, a)
    return {
        "rollout": _rollout_s(case, a),
        "logprob": forward * (2 if cfg.loss.kl_coef > 0 else 1),
        "update": forward * (3 + recomputed_frac(case))
        + _tp_s(case, a)
        + cfg.optimizer_steps_per_step * _optimizer_step_s(case, link),
        "refit": 2 * case.num_parameters / link,
    }


def forward_flops(hf_config: HFConfig, tokens: float, response_tokens: float) -> tuple[float, float]:
    """(of the layers' matrix products, of attention and head) of one sequence."""
    cost, unit = model.cost_of(hf_config), 2 * layer_parameters(hf_config)
    return unit * tokens, unit * (cost.head * response_tokens + cost.quadratic * tokens**2)


def recomputed_frac(case: Case) -> float:
    """Of a forward pass, done again in the backward."""
    p, hf = case.cfg.parallel, case.hf_config
    if p.recompute == "selective" and "mlp" in p.recompute_modules:
        return 3 * hf.hidden_size * hf.intermediate_size * hf.num_hidden_layers / case.layer_parameters
    return 1.0 if p.recompute == "full" else 0.0


def _forward_s(case: Case, a: Assumptions) -> float:
    cfg, p = case.cfg, case.cfg.parallel
    layers, rest = forward_flops(case.hf_config, a.tokens, a.response_tokens)
    bf16 = a.train_mfu * case.gpu.bf16_flops_per_s
    of_layers = a.fp8_mfu * case.gpu.fp8_flops_per_s if cfg.precision.fp8 else bf16
    # Of a replica in an optimizer step.
    microbatches = cfg.batch.global_batch_size * a.tokens / case.dp / (p.cp * cfg.batch.max_tokens_per_microbatch)
    bubble = 1 + (p.pp - 1) / (p.virtual_pp * max(math.ceil(microbatches), 1))
    return bubble * cfg.responses_per_step * (layers / of_layers + rest / bf16) / case.ranks


def _tp_s(case: Case, a: Assumptions) -> float:
    """Two all-reduces a layer (or what sequence parallelism makes of them) forward, two backward, two recomputed; none
    hidden."""
    p, hf = case.cfg.parallel, case.hf_config
    tokens = case.cfg.responses_per_step * a.tokens / (case.ranks / p.tp)
    sent = 2 * (p.tp - 1) / p.tp * 2 * hf.hidden_size * tokens  # bytes of one all-reduce
    all_reduces = hf.num_hidden_layers * (6 if p.recompute == "full" else 4)
    return sent * all_reduces / (a.link_frac * case.gpu.nvlink_bytes_per_s)


def _optimizer_step_s(case: Case, link: float) -> float:
    """Gradients scattered in float32, weights gathered, and the optimizer's reads and writes; nothing hidden."""
    p = case.cfg.parallel
    numbers, shards = memory.num_parameters(case.hf_config, p), case.dp * p.cp
    # Main weights, moments, gradients; the buffer zeroed and its norm taken.
    state = 2 * (12 + 4) * numbers / shards + 2 * 4 * numbers
    return (4 + case.itemsize) * numbers * (shards - 1) / shards / link + state / case.gpu.hbm_bytes_per_s


@dataclass(frozen=True)
class Decoding:
    """Seconds of an engine's iteration, in which each running response gains a token."""

    fixed_s: float
    weights_s: float  # reading the weights
    kv_token_s: float  # reading a token of the cache
    token_s: float  # computing a token


def decoding(case: Case, a: Assumptions) -> Decoding:
    bytes_per_s, tp = a.decode_bandwidth_frac * case.gpu.hbm_bytes_per_s, case.cfg.engine.tp
    return Decoding(
        a.decode_fixed_s,
        memory.engine_weight_bytes(case) / bytes_per_s,
        case.kv_bytes_per_token / tp / bytes_per_s,
        2 * case.num_parameters / tp / (a.decode_mfu * case.gpu.bf16_flops_per_s),
    )


def _rollout_s(case: Case, a: Assumptions) -> float:
    cfg, e = case.cfg, decoding(case, a)

    def iteration_s(batch: float) -> float:
        read = e.weights_s + batch * a.running_tokens * e.kv_token_s
        return max(read, batch * e.token_s) + e.fixed_s

    per_engine = cfg.responses_per_step / cfg.engine.num_engines
    batch = min(running_responses(case, a), per_engine)
    full = per_engine * a.response_tokens / batch  # tokens in a row with the engine full
    longest = cfg.response_tokens(int(a.prompt_tokens))
    # As if one of an engine's GPUs computed its prompts.
    prefill = cfg.rollout.prompts_per_step / cfg.engine.num_engines * a.prompt_tokens * e.token_s * cfg.engine.tp
    return prefill + full * iteration_s(batch) + max(longest - full, 0) * iteration_s(1)


def running_responses(case: Case, a: Assumptions) -> float:
    """At once on one engine: what the KV cache holds of half-grown responses, at most engine.max_running_responses."""
    return max(min(case.cfg.engine.max_running_responses, memory.kv_cache_tokens(case) / a.running_tokens), 1)


def report(case: Case, a: Assumptions) -> str:
    """Of a configuration that fits (memory.check)."""
    cfg, m, p, seconds = case.cfg, memory.needed(case), case.cfg.parallel, times(case, a)
    policy = "engines beside the policy" if case.colocated else "engines and policy apart"
    sleeps = "; an engine sleeps while the policy learns" if case.colocated else ""
    lines = [
        f"{cfg.model}: {case.num_parameters / 1e9:.3f} B parameters; {case.machine.num_gpus} x {case.machine.name}, "
        f"{policy}: tp {p.tp} x cp {p.cp} x pp {p.pp} x dp {case.dp} = {case.ranks} ranks, "
        f"{cfg.engine.num_engines} engines of {cfg.engine.tp} GPUs",
        "",
        f"{'GB of the fullest GPU':36}" + "".join(f"{phase:>9}" for phase in m.phases),
    ]
    for name in dict.fromkeys(name for parts in m.phases.values() for name in parts):
        sizes = (f"{parts[name] / 1e9:9.2f}" if name in parts else " " * 9 for parts in m.phases.values())
        lines.append(f"  {name:34}" + "".join(sizes))
    sums, step_s = "".join(f"{m.total(phase) / 1e9:9.2f}" for phase in m.phases), sum(seconds.values())
    lines += [
        f"  {'sum':34}{sums}   of {m.capacity_bytes / 1e9:.1f}, start: of {m.start_bytes / 1e9:.1f}",
        "",
        "seconds of a step",
        *(f"  {phase:34}{s:9.1f}" for phase, s in seconds.items()),
        f"  {'sum':34}{step_s:9.1f}   {cfg.num_steps} steps: {cfg.num_steps * step_s / 3600:.1f} hours",
        f"  {running_responses(case, a):.0f} responses run at once on an engine",
        "",
        f"Assumed: {a}; {memory.ENGINE_OVERHEAD_BYTES >> 30} GiB of an engine for CUDA and its graphs; "
        f"every token a response token{sleeps}. Not in it: reward, evaluation.",
        "Arithmetic, which has not been compared with a GPU.",
    ]
    return "\n".join(lines)
