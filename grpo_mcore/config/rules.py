"""What must hold of a Config: the bounds that its types name, and the rules between fields. Rules that need
the model or the data stand where those are opened."""

import functools
import typing

from grpo_mcore.config.bounds import Bound, Contains, Section, bounds_of
from grpo_mcore.config.config import Config, InputError, Loss, Parallel, packed_alignment


def check(config: Config) -> None:
    """The bounds of the fields, and the rules between them, that need neither model nor data nor ranks."""
    _check_bounds(config, "")
    if config.responses_per_step % config.batch.global_batch_size:
        raise InputError(
            "batch.global_batch_size",
            config.batch.global_batch_size,
            f"must divide the {config.responses_per_step} responses of a step (rollout.prompts_per_step x "
            f"rollout.group_size)",
            "choose a divisor",
        )
    d, r = config.data, config.rollout
    if r.max_total_tokens is not None and d.max_prompt_tokens >= r.max_total_tokens:
        raise InputError(
            "data.max_prompt_tokens",
            d.max_prompt_tokens,
            f"must leave room for a response in rollout.max_total_tokens = {r.max_total_tokens}",
            "lower it",
        )
    longest = config.longest_train_tokens
    limits = (
        "rollout.max_total_tokens"
        if longest == r.max_total_tokens
        else "data.max_prompt_tokens + rollout.max_response_tokens"
    )
    cp = config.parallel.cp
    multiple = packed_alignment(config.parallel, config.precision) * (2 if cp > 1 else 1)
    needed = -(-longest // (cp * multiple)) * multiple  # a rank's share of it, padded
    if needed > config.batch.max_tokens_per_microbatch:
        share = "" if needed == longest else f"; with its padding {needed} on each of {cp} context ranks"
        raise InputError(
            "batch.max_tokens_per_microbatch",
            config.batch.max_tokens_per_microbatch,
            f"must hold the longest sequence, {longest} tokens ({limits}){share}",
            f"set it to {needed} or more, or shorten the sequences",
        )
    if config.reward.cpu_s > config.reward.wall_s:
        raise InputError(
            "reward.wall_s",
            config.reward.wall_s,
            f"must be reward.cpu_s = {config.reward.cpu_s} or more: a process has no more CPU time than clock time",
            "raise it",
        )
    c, e = config.checkpoint, config.eval
    if c.keep_best and c.best_metric.startswith("eval/") and (e.data is None or c.every % e.every):
        raise InputError(
            "checkpoint.best_metric",
            c.best_metric,
            f"is known of a checkpoint only if eval.every = {e.every} divides checkpoint.every = {c.every}, and "
            f"eval.data is given",
            "change one of them",
        )
    if config.stop.plateau_window and config.stop.plateau_metric.startswith("eval/") and e.data is None:
        raise InputError(
            "stop.plateau_metric",
            config.stop.plateau_metric,
            "is never known without eval.data",
            "set eval.data, or name another metric",
        )
    _check_rollout(config)
    _check_loss(config.loss)
    buffer, limit = config.shaping.overlong_buffer_tokens, config.rollout.max_response_tokens
    if buffer > limit:
        raise InputError(
            "shaping.overlong_buffer_tokens",
            buffer,
            f"must be at most rollout.max_response_tokens = {limit}, at whose end it stands",
            "lower it",
        )
    _check_parallel(config.parallel)
    check_device(config, config.device)


def _check_bounds(section: Section, prefix: str) -> None:
    """Of a dataclass, of those in it and of the items of tuples."""
    for name, bounds in _bounds_of_fields(type(section)).items():
        value = getattr(section, name)
        if isinstance(value, Section):
            _check_bounds(value, f"{prefix}{name}.")
            continue
        for item in value if isinstance(value, tuple) else (value,):
            for bound in bounds:
                if item is not None and not bound.allows(item):
                    raise InputError(prefix + name, item, bound.constraint, bound.remedy_of(item))


@functools.cache
def _bounds_of_fields(cls: type[Section]) -> dict[str, tuple[Bound | Contains, ...]]:
    return {name: bounds_of(hint) for name, hint in typing.get_type_hints(cls, include_extras=True).items()}


def _check_rollout(config: Config) -> None:
    r, e = config.rollout, config.engine
    if r.oversampling_frac and not r.dynamic_sampling:
        raise InputError(
            "rollout.oversampling_frac",
            r.oversampling_frac,
            "draws for groups that rollout.dynamic_sampling passes over, and it is off",
            "switch it on, or set this to 0",
        )
    if r.cache_after_refit == "keep" and not r.max_staleness:
        raise InputError(
            "rollout.cache_after_refit",
            r.cache_after_refit,
            "says what becomes of responses that run during a refit, and with rollout.max_staleness = 0 none does",
            "raise rollout.max_staleness, or leave it at recompute",
        )
    if e.kv_cache_bytes is not None and e.gpu_memory_frac is not None:
        raise InputError(
            "engine.gpu_memory_frac",
            e.gpu_memory_frac,
            f"and engine.kv_cache_bytes = {e.kv_cache_bytes} both set the cache",
            "set one of them to null",
        )
    if e.cores and len(e.cores) < e.num_engines * e.num_threads:
        raise InputError(
            "engine.cores",
            e.cores,
            f"must name a core for each of {e.num_engines} engines x {e.num_threads} threads",
            "name more, or none",
        )


def _check_loss(loss: Loss) -> None:
    if loss.clip_dual is not None and loss.policy_loss == "cispo":
        raise InputError(
            "loss.clip_dual",
            loss.clip_dual,
            "has no meaning for policy_loss = cispo, whose ratio is clipped whatever the advantage's sign",
            "set it to null",
        )


def _check_parallel(p: Parallel) -> None:
    if p.sequence_parallel and p.tp == 1:
        raise InputError(
            "parallel.sequence_parallel",
            True,
            "splits what tp ranks would each hold whole, and parallel.tp is 1",
            "raise parallel.tp, or set it to false",
        )
    if p.virtual_pp > 1 and p.pp == 1:
        raise InputError(
            "parallel.virtual_pp",
            p.virtual_pp,
            "cuts a pipeline stage into chunks, and parallel.pp is 1",
            "raise parallel.pp, or set it to 1",
        )
    if p.overlap_param_gather and not p.overlap_grad_reduce:
        raise InputError(
            "parallel.overlap_param_gather", True, "needs parallel.overlap_grad_reduce", "set both, or neither"
        )


def check_device(config: Config, device: str) -> None:
    """The rules between the configuration and `device`; auto: not known yet."""
    p, kernel, e = config.precision, config.kernels.linear_logprob, config.engine
    if e.placement not in ("auto", "cpu") and device == "cpu":
        raise InputError(
            "engine.placement", e.placement, "shares out GPUs, and this is a CPU", "set it to auto, or run on a GPU"
        )
    if e.is_colocated(device) and p.params == "float32" and "optimizer" in e.offload_trainer:
        raise InputError(
            "engine.offload_trainer",
            e.offload_trainer,
            "cannot take the optimizer off the GPU with precision.params = float32: its weights are the model's own",
            "leave optimizer out, or train in bfloat16",
        )
    if e.placement == "cpu" and device == "cuda":
        raise InputError(
            "engine.placement",
            e.placement,
            "is for engines on a CPU, and this is a GPU",
            "choose colocated or disaggregated",
        )
    if kernel == "triton" and device == "cpu":
        raise InputError(
            "kernels.linear_logprob", kernel, "needs a GPU, and this is a CPU", "set it to auto, or run on a GPU"
        )
    if p.fp8 is None:
        return
    if p.params != "bfloat16":
        raise InputError(
            "precision.fp8", p.fp8, f"needs precision.params = bfloat16, which is {p.params}", "change one of them"
        )
    if device == "cpu":
        raise InputError(
            "precision.fp8",
            p.fp8,
            "needs a GPU with FP8 matrix products (Hopper or newer), and this is a CPU",
            "set precision.fp8=null, or run on a GPU",
        )
    if p.fp8 == "delayed" and (p.fp8_first_layers_bf16 or p.fp8_last_layers_bf16):
        raise InputError(
            "precision.fp8",
            p.fp8,
            "cannot leave single layers in bfloat16: its scales are kept for the whole model",
            "set fp8_first_layers_bf16 and fp8_last_layers_bf16 to 0, or choose tensorwise or blockwise",
        )


def check_ranks(config: Config, world_size: int) -> None:
    """The rules between the configuration and the number of ranks."""
    p = config.parallel
    if world_size % p.ranks_per_replica:
        name = max(("tp", "pp", "cp"), key=lambda axis: getattr(p, axis))
        raise InputError(
            f"parallel.{name}",
            getattr(p, name),
            f"tp {p.tp} x pp {p.pp} x cp {p.cp} must divide the number of ranks, {world_size}",
            "change an axis or --nproc-per-node",
        )
    dp = world_size // p.ranks_per_replica
    least = dp * (p.pp if p.virtual_pp > 1 else 1)
    if config.batch.global_batch_size % least:
        each = f"the {dp} data-parallel ranks" + (
            f" x the {p.pp} pipeline stages, which are interleaved" if p.virtual_pp > 1 else ""
        )
        raise InputError(
            "batch.global_batch_size",
            config.batch.global_batch_size,
            f"must be a multiple of {each}",
            "change one of them",
        )
