"""What must hold of a Config. Rules that need the model or the data stand where those are opened."""

import math

from grpo_mcore.config.config import Config, InputError, Loss, Parallel, packed_alignment

_POSITIVE = """
num_steps num_threads collective_timeout_s data.max_prompt_tokens parallel.tp parallel.pp parallel.virtual_pp
parallel.cp parallel.ep parallel.recompute_num_layers precision.fp8_amax_history optimizer.lr
rollout.prompts_per_step rollout.group_size rollout.temperature rollout.max_response_tokens rollout.max_total_tokens
rollout.timeout_s rollout.max_draws engine.num_engines engine.max_running_responses engine.tp engine.gpu_memory_frac
engine.max_batched_tokens engine.num_threads engine.start_timeout_s engine.health_timeout_s mismatch.warn_above
mismatch.stop_above reward.num_processes reward.cpu_s reward.wall_s reward.memory_bytes batch.global_batch_size
batch.max_tokens_per_microbatch refit.bucket_bytes refit.timeout_s eval.every loss.kl_limit eval.samples_per_prompt
eval.max_prompts eval.max_response_tokens engine.kv_cache_bytes eval.temperature eval.top_p checkpoint.keep
checkpoint.timeout_s warm_start.batch_size warm_start.lr warm_start.max_steps stop.plateau_window
stop.truncated_steps
""".split()
_NOT_NEGATIVE = """
data.skip_prompts loss.kl_coef loss.entropy_coef shaping.overlong_buffer_tokens shaping.overlong_penalty
loss.clip_low loss.clip_high optimizer.warmup_steps optimizer.weight_decay optimizer.clip_grad checkpoint.every
checkpoint.keep_best engine.max_failures rollout.max_staleness rollout.oversampling_frac rollout.keep_texts
precision.fp8_first_layers_bf16 precision.fp8_last_layers_bf16 stop.after_steps stop.plateau_min_gain
""".split()
_FRACTIONS = (
    "stop.truncated_above engine.gpu_memory_frac loss.clip_low eval.top_p optimizer.beta1 optimizer.beta2 "
    "optimizer.warmup_start_frac warm_start.corrupted_frac warm_start.stop_at_pass_rate".split()
)


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
        raise InputError(
            "rollout.group_size",
            config.rollout.group_size,
            "a group needs 2 responses to compare",
            "set it to 2 or more",
        )
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
    align, cp = packed_alignment(config.parallel, config.precision), config.parallel.cp
    needed = (
        -(-longest // (cp * align * (2 if cp > 1 else 1))) * align * (2 if cp > 1 else 1)
    )  # a rank's share of it, padded
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
    if "{problem}" not in config.data.prompt_template:
        raise InputError(
            "data.prompt_template",
            config.data.prompt_template,
            "must contain {problem}",
            "add it where the problem goes",
        )


def _check_rollout(config: Config) -> None:
    r, e = config.rollout, config.engine
    if r.oversampling_frac and not r.dynamic_sampling:
        raise InputError(
            "rollout.oversampling_frac",
            r.oversampling_frac,
            "draws for groups that rollout.dynamic_sampling passes over, and it is off",
            "switch it on, or set this to 0",
        )
    if r.max_draws < 1:
        raise InputError(
            "rollout.max_draws", r.max_draws, "must be 1 or more: a step needs prompts_per_step prompts", "raise it"
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
    for part in e.offload_trainer:
        if part not in ("gradients", "optimizer"):
            raise InputError("engine.offload_trainer", part, "must be of gradients, optimizer", "choose among them")


def _check_loss(loss: Loss) -> None:
    if not 1 <= loss.importance_cap < math.inf:
        raise InputError(
            "loss.importance_cap",
            loss.importance_cap,
            "must be 1 or more: at weight 1 there is nothing to correct",
            "raise it",
        )
    if loss.clip_dual is not None and not 1 < loss.clip_dual < math.inf:
        raise InputError(
            "loss.clip_dual", loss.clip_dual, "must be more than 1, the ratio on policy", "raise it, or set it to null"
        )
    if loss.clip_dual is not None and loss.policy_loss == "cispo":
        raise InputError(
            "loss.clip_dual",
            loss.clip_dual,
            "has no meaning for policy_loss = cispo, whose ratio is clipped whatever the advantage's sign",
            "set it to null",
        )


def _check_parallel(p: Parallel) -> None:
    if p.ep > 1:
        raise InputError(
            "parallel.ep", p.ep, "expert parallelism is not built: the model families here are dense", "leave it at 1"
        )
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
    known = ("core_attn", "mlp")
    for name in p.recompute_modules:
        if name not in known:
            raise InputError("parallel.recompute_modules", name, f"must be of {', '.join(known)}", "choose among them")


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
