"""One vLLM engine as a Ray actor: token ids in, token ids and log-probs out. It never sees text. engines.py is the
handle of all of them."""

import asyncio
import importlib.metadata
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from grpo_mcore.config import config
from grpo_mcore.config.config import InputError
from grpo_mcore.parallel import topology
from grpo_mcore.types import Outcome, Prompt

LOADED = -1  # version of the weights an engine started with


class Unservable(ValueError):
    """A request that no engine could serve: the request's fault, and not the engine's."""


@dataclass(frozen=True)
class Sampling:
    """How to sample the responses of one prompt; response i is seeded with seed + i."""

    num_responses: int
    temperature: float  # 0: the likeliest token each time, for one response
    max_tokens: int
    seed: int
    top_p: float = 1.0
    never_stop: bool = False  # every response has max_tokens


@dataclass(frozen=True)
class Completion:
    token_ids: list[int]
    logprobs: list[float]  # natural log, after temperature (greedy: at 1) and top_p
    truncated: bool
    versions: tuple[tuple[int, int], ...]  # (policy_version, tokens sampled with it), in order
    given: tuple[tuple[int, int], ...] = ()  # of a session, as in types.Response
    outcome: Outcome | None = None
    prompt: Prompt | None = None


class Engine:
    """One AsyncLLM. Runs in a Ray actor; every method is async, so calls interleave.

    A refit is begin_refit, load (once for each piece of the weights), end_refit; then the caller may score, to see what
    arrived; then release. Between begin and release no answer leaves: what was sampled with weights that are not yet
    proven stays here. An engine that started with arbitrary weights samples nothing before its first release.
    """

    def __init__(self, args: dict, log: str, cores: Sequence[int]):
        # vLLM and this process write to a file of their own, of which the end is shown when the engine fails.
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(out, 1)
        os.dup2(out, 2)
        if cores:
            os.sched_setaffinity(0, cores)
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**args))
        self._stop_token_ids: list[int] = []
        self._version = LOADED
        self._num_requests = self._discards = 0
        self._names: dict[int, str] = {}  # vLLM's name of a request, by ours
        self._released = asyncio.Event()  # whether its weights are what they should be
        if args["load_format"] != "dummy":
            self._released.set()
        self._paused = self._asleep = False

    async def ready(self, stop_token_ids: list[int], asleep: bool) -> tuple[str, list[int]]:
        """(host, ids of this process and its children), when it can take requests; with `asleep` when it has given its
        memory back, until its first refit."""
        self._stop_token_ids = stop_token_ids
        if asleep:
            await self.sleep()
        return socket.gethostname(), [os.getpid(), *_children(os.getpid())]

    async def health(self) -> None:
        """Answers when vLLM's own process does, or raises what it died of."""
        await self._llm.check_health()
        await self._llm.is_sleeping()

    async def generate(self, name: int, token_ids: Sequence[int], sampling: Sampling) -> list[Completion]:
        """The completions of one prompt. Raises Unservable."""
        self._check(token_ids, sampling)
        from vllm import SamplingParams
        from vllm.exceptions import VLLMValidationError
        from vllm.sampling_params import RequestOutputKind

        try:
            params = SamplingParams(
                n=sampling.num_responses,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_tokens,
                seed=sampling.seed,
                stop_token_ids=[] if sampling.never_stop else self._stop_token_ids,
                ignore_eos=sampling.never_stop,
                logprobs=0,
                detokenize=False,
                # Any other kind drops the responses that end before the last.
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
        except (ValueError, VLLMValidationError) as e:
            raise Unservable(_one_line(e)) from None
        while True:
            await self._released.wait()  # a refit under way is waited for
            version, discards = self._version, self._discards
            try:
                output = await self._last(token_ids, params, name)
            except (ValueError, VLLMValidationError) as e:  # vLLM's own, of a request before it begins
                raise Unservable(_one_line(e)) from None
            finally:
                self._names.pop(name, None)
            await self._released.wait()
            if discards == self._discards:
                break
        return [
            Completion(
                list(c.token_ids),
                [at[t].logprob for at, t in zip(c.logprobs, c.token_ids, strict=True)],
                c.finish_reason == "length",
                self._versions(c, version),
            )
            for c in sorted(output.outputs, key=lambda c: c.index)
        ]

    def _check(self, token_ids: Sequence[int], sampling: Sampling) -> None:
        """What vLLM does not look at without a tokenizer, and then dies of."""
        model = self._llm.model_config
        if not token_ids:
            raise Unservable("its prompt has no token")
        if not 0 <= min(token_ids) <= max(token_ids) < model.get_vocab_size():
            wrong = next(t for t in token_ids if not 0 <= t < model.get_vocab_size())
            raise Unservable(f"its prompt has token {wrong}, and the model has {model.get_vocab_size()}")
        if len(token_ids) + sampling.max_tokens > model.max_model_len:
            raise Unservable(
                f"its prompt of {len(token_ids)} tokens and a response of {sampling.max_tokens} are longer than the "
                f"{model.max_model_len} that engines were started for"
            )

    def _versions(self, completion, version: int) -> tuple[tuple[int, int], ...]:
        """(policy_version, tokens) spans of what began with `version`."""
        if self._version == version:
            return ((version, len(completion.token_ids)),)
        spans = getattr(completion, "weight_versions", None)
        if spans is None:
            raise RuntimeError(
                "a response ran during a refit, and this vLLM does not say which weights sampled a token"
            )
        return tuple(
            (LOADED if s.version == "default" else int(s.version), s.end - s.start) for s in spans if s.end > s.start
        )

    async def cancel(self, name: int) -> None:
        """Ends a request, whose answer nobody waits for."""
        if name in self._names:
            await self._llm.abort(self._names[name])

    async def score(self, sequences: list[list[int]]) -> list[list[float]]:
        """Log-probs, at temperature 1, of each sequence's tokens from its second on."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        outputs = await asyncio.gather(*(self._last(ids, params) for ids in sequences))
        return [
            [at[t].logprob for at, t in zip(o.prompt_logprobs[1:], ids[1:], strict=True)]
            for o, ids in zip(outputs, sequences, strict=True)
        ]

    async def _last(self, token_ids: Sequence[int], params, name: int | None = None):
        self._num_requests += 1
        request_id = str(self._num_requests)
        if name is not None:
            self._names[name] = request_id
        last = None
        async for output in self._llm.generate({"prompt_token_ids": list(token_ids)}, params, request_id=request_id):
            last = output
        return last

    async def sleep(self) -> None:
        """Gives the GPU's memory back. Running requests go on after the next refit, which brings the weights again."""
        await self._llm.sleep(level=2, mode="keep")
        self._paused = self._asleep = True

    async def places(self) -> list[list[str]]:
        """[host, GPU's UUID or ""] of each process that holds weights."""
        return await self._llm.collective_rpc("place")

    async def init_transfer(self, init_info: dict) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info))

    async def begin_refit(self, discard: bool) -> None:
        """Running requests pause; weights may arrive. With `discard` what they have, and what is not yet released, is
        sampled again from its first token: the weights of the last refit were not what they should be."""
        self._released.clear()
        if self._names:  # it takes 20 ms
            await self._llm.pause_generation(mode="keep", clear_cache=False)
            self._paused = True
        if discard:
            self._discards += 1
            await self._llm.abort(list(self._names.values()))
        if self._asleep:
            await self._llm.wake_up(tags=["weights"])
        await self._llm.collective_rpc("begin_weight_update")

    async def load(self, update_info: dict) -> float:
        """Part of the weights, or all of them: what the sender sends meanwhile, or has sent. Returns seconds."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        start = time.perf_counter()
        await self._llm.update_weights(WeightTransferUpdateRequest(update_info={"info": update_info}))
        return time.perf_counter() - start

    async def end_refit(self, version: int, keep_cache: bool) -> None:
        """All weights have arrived. Running requests go on, with the keys and values of the old weights if
        keep_cache."""
        await self._llm.finish_weight_update()
        if hasattr(self._llm, "update_weight_version"):
            await self._llm.update_weight_version(str(version))
        if self._asleep:
            await self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        elif not keep_cache and not await self._llm.reset_prefix_cache(reset_running_requests=True):
            raise RuntimeError("vLLM did not reset its prefix cache")
        self._version = version
        if self._paused:
            await self._llm.resume_generation()
            self._paused = False

    async def release(self) -> None:
        """The weights have been proven."""
        self._released.set()


def _one_line(e: Exception) -> str:
    return " ".join(str(e).split())


def _children(process_id: int) -> list[int]:
    """Ids of a process's children and theirs, of this machine."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended since
            continue
    found = [process_id]
    for parent in found:
        found += [child for child, of in parents.items() if of == parent]
    return found[1:]


def arguments(cfg: config.Config, folder: str, *, cuda: bool, alone: bool) -> dict[str, object]:
    """vLLM's engine arguments; `alone`: there is no trainer. Raises InputError."""
    e, device = cfg.engine, "cuda" if cuda else "cpu"
    if cfg.rollout.max_staleness and _vllm() < (0, 32):
        raise InputError(
            "rollout.max_staleness",
            cfg.rollout.max_staleness,
            "needs vllm 0.32 or newer, which says which weights sampled a token",
            "set it to 0, or install it",
        )
    args: dict[str, object] = dict(
        model=str(Path(folder).absolute()),
        dtype=e.dtype,
        quantization=e.quantization,
        kv_cache_dtype=e.kv_cache_dtype,
        kv_cache_memory_bytes=e.kv_cache_bytes,
        max_model_len=cfg.longest_tokens,
        max_num_seqs=e.max_running_responses,
        max_num_batched_tokens=e.tokens_per_step(device),
        enable_prefix_caching=e.prefix_caching,
        enforce_eager=e.enforce_eager or not cuda,
        tensor_parallel_size=e.tp,
        distributed_executor_backend="mp" if e.tp > 1 else None,  # in a placement group vLLM would choose ray
        seed=cfg.seed,
        skip_tokenizer_init=True,
        generation_config="vllm",  # not the model folder's: it may carry a temperature or a top_p of its own
        logprobs_mode="processed_logprobs",  # those of the distribution that was sampled from
        load_format="auto" if alone else "dummy",  # beside a trainer the first refit brings them
        weight_transfer_config={"backend": "grpo_mcore"},  # receiver.py's, for every transport
        worker_extension_cls="grpo_mcore.refit.receiver.WorkerExtension",
        disable_log_stats=True,
    )
    if cuda:
        in_turns = e.is_colocated(device) and not alone
        return args | dict(enable_sleep_mode=in_turns, gpu_memory_utilization=e.share_of_gpu(in_turns=in_turns))
    if e.kv_cache_bytes is None:
        raise InputError(
            "engine.kv_cache_bytes",
            None,
            "must be given for an engine on a CPU",
            "set it to 67108864 for a tiny model, or to what the responses need",
        )
    if e.kv_cache_dtype != "auto":
        raise InputError("engine.kv_cache_dtype", e.kv_cache_dtype, "needs a GPU, and this is a CPU", "set it to auto")
    return args | dict(
        block_size=32,  # the CPU's default of 128 leaves short prompts without a prefix hit
        # A seeded request whose prompt is split over two engine steps rewinds its generator, which a CPU's cannot.
        enable_chunked_prefill=False,
        max_num_batched_tokens=max(e.tokens_per_step(device), cfg.longest_tokens, e.max_running_responses),
    )


def _vllm() -> tuple[int, int]:
    """Its release, by whichever name it is installed."""
    name = next(name for name in importlib.metadata.packages_distributions()["vllm"])
    major, minor = importlib.metadata.version(name).split(".")[:2]
    return int(major), int(minor)


def environment(cfg: config.Config, *, cuda: bool) -> dict[str, str]:
    """Variables of an engine's processes."""
    env = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1"}
    if cuda:
        # A refit by NCCL is one communicator of the driver and all engines.
        env |= topology.nccl_environment(cfg.deterministic)
        return env | ({"VLLM_BATCH_INVARIANT": "1"} if cfg.deterministic else {})
    return env | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core is its own worker: one process less to start
        "TORCHDYNAMO_DISABLE": "1",  # two small samplers compile themselves at first use, 20 s, despite enforce_eager
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the default binds every engine to the same core
        "OMP_NUM_THREADS": str(cfg.engine.num_threads),
        "OMP_WAIT_POLICY": "passive",  # spinning threads would take the trainer's core
    }
