"""What must hold of a Config: the bounds that its types name, and the rules between fields, of all programs (check) or
of training alone (check_metrics). Rules that need the model or the data stand where those are opened."""

import difflib
import functools
import operator
import re
import typing

from grpo_mcore.config import data_sources, metric_names
from grpo_mcore.config.bounds import METRIC_NAME, Bound, Contains, Matches, Section, bounds_of
from grpo_mcore.config.config import (
    ENVIRONMENT,
    PLAIN_ATTENTION_TOKENS,
    VERIFIERS,
    Config,
    InputError,
    packed_alignment,
)


def check(config: Config) -> None:
    """The bounds of the fields, and the rules between them, that need neither model nor data nor ranks."""
    _check_bounds(config, "")
    data_sources.check(config)
    _check_sizes(config)
    _check_rollout(config)
    _check_reward(config)
    _check_training(config)
    check_device(config, config.device)


def _need(config: Config, holds: object, name: str, constraint: str, remedy: str) -> None:
    if not holds:
        raise InputError(name, operator.attrgetter(name)(config), constraint, remedy)


def _check_bounds(section: Section, prefix: str) -> None:
    """Of a dataclass, of those in it and of the items of tuples, which may be such again."""
    for name, bounds in _bounds_of_fields(type(section)).items():
        value = getattr(section, name)
        if isinstance(value, Section):
            _check_bounds(value, f"{prefix}{name}.")
            continue
        for i, item in enumerate(value if isinstance(value, tuple) else (value,)):
            if isinstance(item, Section):
                _check_bounds(item, f"{prefix}{name}[{i}].")
                continue
            for bound in bounds:
                if item is not None and not bound.allows(item):
                    raise InputError(prefix + name, item, bound.constraint, bound.remedy_of(item))


@functools.cache
def _bounds_of_fields(cls: type[Section]) -> dict[str, tuple[Bound | Contains | Matches, ...]]:
    return {name: bounds_of(hint) for name, hint in typing.get_type_hints(cls, include_extras=True).items()}


def _check_sizes(config: Config) -> None:
    need = functools.partial(_need, config)
    d, r, b = config.data, config.rollout, config.batch
    need(
        config.responses_per_step % b.global_batch_size == 0,
        "batch.global_batch_size",
        f"must divide the {config.responses_per_step} responses of a step (rollout.prompts_per_step x "
        f"rollout.group_size)",
        "choose a divisor",
    )
    need(
        d.answer_regex is None or _has_group(d.answer_regex),
        "data.answer_regex",
        "must be a regular expression with a group, which is the answer",
        "mend it, as '#### (.+)'",
    )
    for field, given in (("data.train", d.train), ("eval.data", config.eval.data)):
        for i, source in enumerate(given if isinstance(given, tuple) else ()):
            if source.answer_regex is not None and not _has_group(source.answer_regex):
                raise InputError(
                    f"{field}[{i}].answer_regex",
                    source.answer_regex,
                    "must be a regular expression with a group, which is the answer",
                    "mend it, as '#### (.+)'",
                )
    total = r.max_total_tokens
    need(
        total is None or d.max_prompt_tokens < total,
        "data.max_prompt_tokens",
        f"must leave room for a response in rollout.max_total_tokens = {total}",
        "lower it",
    )
    longest, cp = config.longest_train_tokens, config.parallel.cp
    limits = "rollout.max_total_tokens" if longest == total else "data.max_prompt_tokens + rollout.max_response_tokens"
    multiple = packed_alignment(config.parallel, config.precision) * (2 if cp > 1 else 1)
    needed = -(-longest // (cp * multiple)) * multiple  # a rank's share of it, padded
    share = "" if needed == longest else f"; with its padding {needed} on each of {cp} context ranks"
    need(
        needed <= b.max_tokens_per_microbatch,
        "batch.max_tokens_per_microbatch",
        f"must hold the longest sequence, {longest} tokens ({limits}){share}",
        f"set it to {needed} or more, or shorten the sequences",
    )
    need(
        config.reward.cpu_s <= config.reward.wall_s,
        "reward.wall_s",
        f"must be reward.cpu_s = {config.reward.cpu_s} or more: a process has no more CPU time than clock time",
        "raise it",
    )


def _check_reward(config: Config) -> None:
    """Of reward.functions and what refers to them."""
    need, reward = functools.partial(_need, config), config.reward
    need(
        reward.combine == "sum" or reward.functions,
        "reward.combine",
        "is about reward.functions, and there are none",
        "leave it at sum, or name functions",
    )
    need(
        not (reward.compare_verifiers and reward.functions),
        "reward.compare_verifiers",
        "is of reward.verifier alone, and reward.functions take its place",
        "set it to false, and add the other verifier to the functions with weight 0",
    )
    names = [f.label for f in reward.functions]
    paths = [f.path for f in reward.functions]
    need(
        config.environment is not None or ENVIRONMENT not in paths,
        "environment",
        "is named by reward.functions, and there is none",
        "set environment.path",
    )
    need(
        config.environment is None or reward.functions,
        "reward.functions",
        "must say what a session's reward is made of",
        f"write [{{path: {ENVIRONMENT}}}], or name functions of the whole text",
    )
    need(
        config.environment is None or config.data.chat_template,
        "data.chat_template",
        "must be true with an environment, whose messages it writes",
        "set it to true",
    )
    for i, f in enumerate(reward.functions):
        field = f"reward.functions[{i}]"
        if f.is_verifier and f.path not in VERIFIERS:
            there_are = f"FILE.py:NAME, package.module:NAME nor one of {', '.join(VERIFIERS)}"
            raise InputError(f"{field}.path", f.path, f"is neither {there_are}", "write FILE.py:NAME")
        if f.is_function and not all(f.path.rpartition(":")[::2]):
            raise InputError(f"{field}.path", f.path, "must name a function behind the colon", "write FILE.py:NAME")
        if not f.is_function and (f.style, f.cpu_s, f.wall_s) != ("auto", None, None):
            what = "is no function, and has neither a style nor limits of its own"
            raise InputError(f"{field}.path", f.path, what, "leave style, cpu_s and wall_s out")
        cpu_s, wall_s = f.cpu_s or reward.cpu_s, f.wall_s or reward.wall_s
        if cpu_s > wall_s:
            what = f"must be at most wall_s, {wall_s:g}: a process has no more CPU time than clock time"
            raise InputError(f"{field}.cpu_s", cpu_s, what, f"raise {field}.wall_s")
        if names.index(f.label) < i or not METRIC_NAME.allows(f.label) or f.label == "mean":
            raise InputError(f"{field}.name", f.label, "is no name, or another function's", f"set {field}.name")
    need(
        config.eval.reward is None or config.eval.reward in names,
        "eval.reward",
        f"is none of reward.functions{' (' + ', '.join(names) + ')' if names else ''}",
        "name one of them, or set it to null",
    )


def _has_group(pattern: str) -> bool:
    try:
        return re.compile(pattern).groups > 0
    except (re.error, RecursionError, OverflowError):
        return False


def check_metrics(config: Config) -> None:
    """Whether a training run writes the metrics that it is to be judged by."""
    need = functools.partial(_need, config)
    c, e, stop = config.checkpoint, config.eval, config.stop
    for name, metric, is_used in (
        ("checkpoint.best_metric", c.best_metric, c.keep_best),
        ("stop.plateau_metric", stop.plateau_metric, stop.plateau_window),
    ):
        if not is_used:
            continue
        need(not metric.startswith("eval/") or e.data, name, "is never known without eval.data", "set eval.data")
        names = [*metric_names.of_steps(config), *metric_names.of_evaluations(config)]
        near = difflib.get_close_matches(metric, names, n=1)
        there_are = "there are " + ", ".join(sorted(names))
        need(
            metric in names, name, "is no metric that this run writes", f"did you mean {near[0]}" if near else there_are
        )
    need(
        not (c.keep_best and c.best_metric.startswith("eval/")) or c.every % e.every == 0,
        "checkpoint.best_metric",
        f"is known of a checkpoint only if eval.every = {e.every} divides checkpoint.every = {c.every}",
        "change one of them",
    )


def _check_rollout(config: Config) -> None:
    need = functools.partial(_need, config)
    r, e = config.rollout, config.engine
    need(
        not r.oversampling_frac or r.dynamic_sampling,
        "rollout.oversampling_frac",
        "draws for groups that rollout.dynamic_sampling passes over, and it is off",
        "switch it on, or set this to 0",
    )
    need(
        config.eval.temperature == 0 or config.eval.temperature >= 0.01,
        "eval.temperature",
        "would be 0.01 in the engine",
        "set it to 0, which is greedy, or to 0.01 or more",
    )
    need(
        config.eval.temperature > 0 or config.eval.samples_per_prompt == 1,
        "eval.samples_per_prompt",
        "must be 1 with eval.temperature = 0: greedy samples of a problem are all the same",
        "set it to 1, or raise the temperature",
    )
    need(
        e.max_batched_tokens is None or e.max_batched_tokens >= e.max_running_responses,
        "engine.max_batched_tokens",
        f"must be engine.max_running_responses = {e.max_running_responses} or more: each takes a token of a step",
        "raise it, or lower engine.max_running_responses",
    )
    need(
        r.cache_after_refit != "keep" or r.max_staleness,
        "rollout.cache_after_refit",
        "says what becomes of responses that run during a refit, and with rollout.max_staleness = 0 none does",
        "raise rollout.max_staleness, or leave it at recompute",
    )
    need(
        e.kv_cache_bytes is None or e.gpu_memory_frac is None,
        "engine.gpu_memory_frac",
        f"and engine.kv_cache_bytes = {e.kv_cache_bytes} both set the cache",
        "set one of them to null",
    )
    need(
        not e.cores or len(e.cores) >= e.num_engines * e.num_threads,
        "engine.cores",
        f"must name a core for each of {e.num_engines} engines x {e.num_threads} threads",
        "name more, or none",
    )


def _check_training(config: Config) -> None:
    need = functools.partial(_need, config)
    loss, p = config.loss, config.parallel
    need(
        loss.clip_dual is None or loss.policy_loss != "cispo",
        "loss.clip_dual",
        "has no meaning for policy_loss = cispo, whose ratio is clipped whatever the advantage's sign",
        "set it to null",
    )
    limit = config.rollout.max_response_tokens
    need(
        config.shaping.overlong_buffer_tokens <= limit,
        "shaping.overlong_buffer_tokens",
        f"must be at most rollout.max_response_tokens = {limit}, at whose end it stands",
        "lower it",
    )
    need(
        not p.sequence_parallel or p.tp > 1,
        "parallel.sequence_parallel",
        "splits what tp ranks would each hold whole, and parallel.tp is 1",
        "raise parallel.tp, or set it to false",
    )
    need(
        p.virtual_pp == 1 or p.pp > 1,
        "parallel.virtual_pp",
        "cuts a pipeline stage into chunks, and parallel.pp is 1",
        "raise parallel.pp, or set it to 1",
    )
    need(
        not p.overlap_param_gather or p.overlap_grad_reduce,
        "parallel.overlap_param_gather",
        "needs parallel.overlap_grad_reduce",
        "set both, or neither",
    )


def check_device(config: Config, device: str) -> None:
    """The rules between the configuration and `device`; auto: not known yet."""
    need = functools.partial(_need, config)
    p, e = config.precision, config.engine
    need(
        e.placement in ("auto", "cpu") or device != "cpu",
        "engine.placement",
        "shares out GPUs, and this is a CPU",
        "set it to auto, or run on a GPU",
    )
    need(
        not (e.is_colocated(device) and p.params == "float32" and "optimizer" in e.offload_trainer),
        "engine.offload_trainer",
        "cannot take the optimizer off the GPU with precision.params = float32: its weights are the model's own",
        "leave optimizer out, or train in bfloat16",
    )
    longest, unfused = config.longest_train_tokens, p.params == "float32" and device == "cuda"
    need(
        not unfused or longest <= PLAIN_ATTENTION_TOKENS,
        "precision.params",
        f"has no fused attention on a GPU, and without it a sequence has at most {PLAIN_ATTENTION_TOKENS} tokens, not "
        f"{longest}",
        "train in bfloat16, or shorten the sequences",
    )
    need(
        not unfused or config.parallel.cp == 1,
        "parallel.cp",
        "needs fused attention, which precision.params = float32 does not have on a GPU",
        "train in bfloat16, or set it to 1",
    )
    need(
        not e.is_colocated(device) or config.rollout.cache_after_refit != "keep",
        "rollout.cache_after_refit",
        "cannot keep what colocated engines give back before every update",
        "leave it at recompute, or set engine.placement=disaggregated",
    )
    need(
        not e.is_colocated(device) or config.refit.transport != "broadcast",
        "refit.transport",
        "is NCCL's on GPUs, which refuses two processes on one, and colocated engines stand on the trainers'",
        "set it to auto, or set engine.placement=disaggregated",
    )
    need(
        e.placement != "cpu" or device != "cuda",
        "engine.placement",
        "is for engines on a CPU, and this is a GPU",
        "choose colocated or disaggregated",
    )
    need(
        config.kernels.linear_logprob != "triton" or device != "cpu",
        "kernels.linear_logprob",
        "needs a GPU, and this is a CPU",
        "set it to auto, or run on a GPU",
    )
    if p.fp8 is None:
        return
    need(
        p.params == "bfloat16",
        "precision.fp8",
        f"needs precision.params = bfloat16, which is {p.params}",
        "change one of them",
    )
    need(
        device != "cpu",
        "precision.fp8",
        "needs a GPU with FP8 matrix products (Hopper or newer), and this is a CPU",
        "set precision.fp8=null, or run on a GPU",
    )
    need(
        p.fp8 != "delayed" or not (p.fp8_first_layers_bf16 or p.fp8_last_layers_bf16),
        "precision.fp8",
        "cannot leave single layers in bfloat16: its scales are kept for the whole model",
        "set fp8_first_layers_bf16 and fp8_last_layers_bf16 to 0, or choose tensorwise or blockwise",
    )


def check_ranks(config: Config, world_size: int) -> None:
    """The rules between the configuration and the number of ranks."""
    p = config.parallel
    largest = max(("tp", "pp", "cp"), key=lambda axis: getattr(p, axis))
    _need(
        config,
        world_size % p.ranks_per_replica == 0,
        f"parallel.{largest}",
        f"tp {p.tp} x pp {p.pp} x cp {p.cp} must divide the number of ranks, {world_size}",
        "change an axis or --nproc-per-node",
    )
    dp, interleaved = world_size // p.ranks_per_replica, p.virtual_pp > 1
    stages = f" x the {p.pp} pipeline stages, which are interleaved" if interleaved else ""
    _need(
        config,
        config.batch.global_batch_size % (dp * (p.pp if interleaved else 1)) == 0,
        "batch.global_batch_size",
        f"must be a multiple of the {dp} data-parallel ranks{stages}",
        "change one of them",
    )
