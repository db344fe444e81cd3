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
from grpo_mcore.plan.memory import (
    ENGINE_OVERHEAD_BYTES,
    Machine,
    engine_weight_bytes,
    kv_bytes_per_token,
    layer_parameters,
    num_parameters,
    placement,
    sharing,
)
from grpo_mcore.policy import model


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


def times(cfg: Config, hf_config, machine: Machine, a: Assumptions) -> dict[str, float]:
    """Seconds of a step, by phase."""
    at, gpu = placement(cfg, hf_config, machine), machine.gpu
    link = a.link_frac * (gpu.nvlink_bytes_per_s if machine.num_gpus <= 8 else a.network_bytes_per_s)
    weight_bytes = 2 * num_parameters(hf_config)
    forward = _forward_s(cfg, hf_config, machine, a, at.ranks)
    return {
        "rollout": _rollout_s(cfg, hf_config, machine, a),
        "logprob": forward * (2 if cfg.loss.kl_coef > 0 else 1),
        "update": forward * (3 + recomputed_frac(cfg, hf_config))
        + _tp_s(cfg, hf_config, machine, a, at.ranks)
        + cfg.optimizer_steps_per_step * _optimizer_step_s(cfg, hf_config, machine, at.dp, link),
        "refit": weight_bytes / link,
    }


def forward_flops(hf_config, tokens: float, response_tokens: float) -> tuple[float, float]:
    """(of the layers' matrix products, of attention and head) of one sequence."""
    cost, unit = model.cost_of(hf_config), 2 * layer_parameters(hf_config)
    return unit * tokens, unit * (cost.head * response_tokens + cost.quadratic * tokens**2)


def recomputed_frac(cfg: Config, hf_config) -> float:
    """Of a forward pass, done again in the backward."""
    p = cfg.parallel
    if p.recompute == "full":
        return 1.0
    mlp = (
        3
        * hf_config.hidden_size
        * hf_config.intermediate_size
        * hf_config.num_hidden_layers
        / layer_parameters(hf_config)
    )
    return mlp if p.recompute == "selective" and "mlp" in p.recompute_modules else 0.0


def _forward_s(cfg: Config, hf_config, machine: Machine, a: Assumptions, ranks: int) -> float:
    layers, rest = forward_flops(hf_config, a.prompt_tokens + a.response_tokens, a.response_tokens)
    bf16 = a.train_mfu * machine.gpu.bf16_flops_per_s
    of_layers = a.fp8_mfu * machine.gpu.fp8_flops_per_s if cfg.precision.fp8 else bf16
    bubble = 1 + (cfg.parallel.pp - 1) / (cfg.parallel.virtual_pp * _microbatches(cfg, a, ranks))
    return bubble * cfg.responses_per_step * (layers / of_layers + rest / bf16) / ranks


def _microbatches(cfg: Config, a: Assumptions, ranks: int) -> int:
    """Of a replica in an optimizer step."""
    tokens = (
        cfg.batch.global_batch_size * (a.prompt_tokens + a.response_tokens) / (ranks // cfg.parallel.ranks_per_replica)
    )
    return max(math.ceil(tokens / (cfg.parallel.cp * cfg.batch.max_tokens_per_microbatch)), 1)


def _tp_s(cfg: Config, hf_config, machine: Machine, a: Assumptions, ranks: int) -> float:
    """Two all-reduces a layer (or what sequence parallelism makes of them) forward, two backward, two recomputed; none
    hidden."""
    p = cfg.parallel
    if p.tp == 1:
        return 0.0
    tokens = cfg.responses_per_step * (a.prompt_tokens + a.response_tokens) / (ranks / p.tp)
    sent = 2 * (p.tp - 1) / p.tp * 2 * hf_config.hidden_size * tokens  # bytes of one all-reduce
    return (
        sent
        * hf_config.num_hidden_layers
        * (6 if p.recompute == "full" else 4)
        / (a.link_frac * machine.gpu.nvlink_bytes_per_s)
    )


def _optimizer_step_s(cfg: Config, hf_config, machine: Machine, dp: int, link: float) -> float:
    """Gradients scattered in float32, weights gathered, and the optimizer's reads and writes; nothing hidden."""
    numbers, shards = num_parameters(hf_config, cfg.parallel), dp * cfg.parallel.cp
    size = 2 if cfg.precision.params == "bfloat16" else 4
    state = (
        2 * (12 + 4) * numbers / shards + 2 * 4 * numbers
    )  # main weights, moments, gradients; the buffer zeroed and its norm taken
    return (4 + size) * numbers * (shards - 1) / shards / link + state / machine.gpu.hbm_bytes_per_s


def _rollout_s(cfg: Config, hf_config, machine: Machine, a: Assumptions) -> float:
    at, gpu = placement(cfg, hf_config, machine), machine.gpu
    numbers, kv, weights = (
        num_parameters(hf_config),
        kv_bytes_per_token(hf_config, sharing(cfg).kv_bytes),
        engine_weight_bytes(cfg, hf_config),
    )
    running = running_responses(cfg, hf_config, machine, a)
    context = a.prompt_tokens + a.response_tokens / 2  # of a running response, on average

    def token_s(batch: float) -> float:
        """Of one token of each of `batch` responses."""
        read = (weights + batch * context * kv / at.engine_tp) / (a.decode_bandwidth_frac * gpu.hbm_bytes_per_s)
        return max(read, 2 * numbers * batch / at.engine_tp / (a.decode_mfu * gpu.bf16_flops_per_s)) + a.decode_fixed_s

    per_engine = cfg.responses_per_step / cfg.engine.num_engines
    batch = min(running, per_engine)
    full = per_engine * a.response_tokens / batch  # tokens in a row with the engine full
    longest = cfg.response_tokens(int(a.prompt_tokens))
    prefill = (
        cfg.rollout.prompts_per_step
        / cfg.engine.num_engines
        * 2
        * numbers
        * a.prompt_tokens
        / (a.decode_mfu * gpu.bf16_flops_per_s)
    )
    return prefill + full * token_s(batch) + max(longest - full, 0) * token_s(1)


def running_responses(cfg: Config, hf_config, machine: Machine, a: Assumptions) -> float:
    """At once on one engine: what the KV cache holds of half-grown responses, at most engine.max_running_responses."""
    at = placement(cfg, hf_config, machine)
    cache = memory.of(cfg, hf_config, machine).phases["rollout"]["engine: KV cache"] * at.engine_tp
    held = cache / (kv_bytes_per_token(hf_config, sharing(cfg).kv_bytes) * (a.prompt_tokens + a.response_tokens / 2))
    return max(min(cfg.engine.max_running_responses, held), 1)


def report(cfg: Config, hf_config, machine: Machine, a: Assumptions) -> str:
    """Of a configuration that fits (memory.check)."""
    at, m, p = placement(cfg, hf_config, machine), memory.of(cfg, hf_config, machine), cfg.parallel
    seconds = times(cfg, hf_config, machine, a)
    names = list(dict.fromkeys(name for parts in m.phases.values() for name in parts))
    lines = [
        f"{cfg.model}: {num_parameters(hf_config) / 1e9:.3f} B parameters; {machine.num_gpus} x {machine.name}, "
        f"{'engines beside the policy' if at.colocated else 'engines and policy apart'}: tp {p.tp} x cp {p.cp} x "
        f"pp {p.pp} x dp {at.dp} = {at.ranks} ranks, "
        f"{cfg.engine.num_engines} engines of {at.engine_tp} GPUs",
        "",
        f"{'GB of the fullest GPU':36}" + "".join(f"{phase:>9}" for phase in m.phases),
        *(
            f"  {name:34}"
            + "".join(f"{parts[name] / 1e9:9.2f}" if name in parts else " " * 9 for parts in m.phases.values())
            for name in names
        ),
        f"  {'sum':34}"
        + "".join(f"{m.total(phase) / 1e9:9.2f}" for phase in m.phases)
        + f"   of {m.capacity_bytes / 1e9:.1f}",
        "",
        "seconds of a step",
        *(f"  {phase:34}{s:9.1f}" for phase, s in seconds.items()),
        f"  {'sum':34}{sum(seconds.values()):9.1f}   {cfg.num_steps} steps: "
        f"{cfg.num_steps * sum(seconds.values()) / 3600:.1f} hours",
        f"  {running_responses(cfg, hf_config, machine, a):.0f} responses run at once on an engine",
        "",
        f"Assumed: {a}; {ENGINE_OVERHEAD_BYTES >> 30} GiB of an engine beside weights and KV cache; every token a "
        f"response token"
        f"{'; an engine sleeps while the policy learns' if at.colocated else ''}. Not in it: reward, evaluation.",
        "Arithmetic, which has not been compared with a GPU.",
    ]
    return "\n".join(lines)
