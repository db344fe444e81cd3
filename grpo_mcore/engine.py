"""vLLM engines as Ray actors: token ids in, token ids and log-probs out. The engines never see text.

`Engines` is the driver's handle of all of them: it starts them, deals requests out by load, and calls them with a deadline. An
engine that dies, fails or no longer answers while it samples is replaced, and its requests go to the others; the replacement
takes part from the next refit on. Whatever cannot go on says which engine, in which phase, with that engine's own last words.
"""

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import ray

from grpo_mcore import config

LOADED = -1  # version of the weights an engine started with
HEALTH_EVERY_S = 2.0


@dataclass(frozen=True)
class Sampling:
    """How to sample the responses of one prompt; response i is seeded with seed + i."""

    num_responses: int
    temperature: float
    max_tokens: int
    seed: int
    top_p: float = 1.0


@dataclass(frozen=True)
class Completion:
    token_ids: list[int]
    logprobs: list[float]  # natural log, after temperature and top_p
    truncated: bool
    policy_version: int


class EngineError(RuntimeError):
    """An engine died, failed or missed its deadline."""


class EnginesLost(EngineError):
    """None is left, and replacements are on their way: a refit waits for them."""


class Engine:
    """One AsyncLLM. Runs in a Ray actor; every method is async, so calls interleave."""

    def __init__(self, args: dict, log: str):
        # vLLM and this process write to a file of their own, of which the end is shown when the engine fails.
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(out, 1)
        os.dup2(out, 2)
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**args))
        self._stop_token_ids: list[int] = []
        self._version = LOADED
        self._requests = 0

    async def ready(self, stop_token_ids: list[int]) -> tuple[str, int]:
        """(host, process id), when it can take requests."""
        self._stop_token_ids = stop_token_ids
        return socket.gethostname(), os.getpid()

    async def health(self) -> None:
        """Answers at once, or raises what vLLM died of."""
        await self._llm.check_health()

    async def generate(self, token_ids: Sequence[int], sampling: Sampling) -> list[Completion]:
        """The completions of one prompt."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            n=sampling.num_responses, temperature=sampling.temperature, top_p=sampling.top_p, max_tokens=sampling.max_tokens,
            seed=sampling.seed, stop_token_ids=self._stop_token_ids, logprobs=0, detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY)  # any other kind drops the responses that end before the last
        version = self._version
        output = await self._last(token_ids, params)
        return [
            Completion(
                list(c.token_ids), [at[t].logprob for at, t in zip(c.logprobs, c.token_ids, strict=True)], c.finish_reason == "length", version)
            for c in sorted(output.outputs, key=lambda c: c.index)
        ]

    async def score(self, sequences: list[list[int]]) -> list[list[float]]:
        """Log-probs, at temperature 1, of each sequence's tokens from its second on."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        outputs = await asyncio.gather(*(self._last(ids, params) for ids in sequences))
        return [
            [at[t].logprob for at, t in zip(o.prompt_logprobs[1:], ids[1:], strict=True)]
            for o, ids in zip(outputs, sequences, strict=True)
        ]

    async def _last(self, token_ids: Sequence[int], params):
        self._requests += 1
        output = None
        async for output in self._llm.generate({"prompt_token_ids": list(token_ids)}, params, request_id=str(self._requests)):
            pass
        return output

    async def places(self) -> list[list[str]]:
        """[host, GPU's UUID or ""] of each process that holds weights."""
        return await self._llm.collective_rpc("place")

    async def init_transfer(self, init_info: dict) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info))

    async def begin_refit(self) -> None:
        await self._llm.collective_rpc("begin_weight_update")

    async def load_weights(self, update_info: dict) -> float:
        """Part of a refit, or all of it: what the sender sends meanwhile, or has sent. Returns seconds."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        start = time.perf_counter()
        await self._llm.update_weights(WeightTransferUpdateRequest(update_info={"info": update_info}))
        return time.perf_counter() - start

    async def end_refit(self, version: int) -> None:
        await self._llm.finish_weight_update()
        # Cached keys and values are those of the old weights.
        if not await self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache: requests are still running")
        self._version = version


@dataclass(eq=False)
class Slot:
    """One place for an engine, and who is in it."""

    index: int
    log: Path
    actor: ray.actor.ActorHandle
    process_id: tuple[str, int] | None = None  # (host, number), once it has started
    ready: bool = False  # takes requests: started, and refitted with the others
    pending: dict[ray.ObjectRef, int] = field(default_factory=dict)  # its requests
    ping: tuple[ray.ObjectRef, float] | None = None  # and when it was sent

    def last_words(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-15:] if self.log.is_file() else []
        return f"The end of {self.log}:\n  " + "\n  ".join(lines or ["(empty)"])


class Engines:
    """All engines of a run; lives on the driver."""

    def __init__(self, cfg: config.Config, folder: str, *, cuda: bool, stop_token_ids: list[int], load_weights: bool = False):
        """Starts Ray (or joins the cluster of RAY_ADDRESS) and the engines, without waiting for them.

        Without `load_weights` an engine's weights are arbitrary until the first refit.
        """
        self._cfg, self._stop_token_ids, self._cuda = cfg.engine, stop_token_ids, cuda
        self._rollout_timeout_s = cfg.rollout.timeout_s
        self._args = {**_engine_args(cfg, folder, cuda=cuda, load_weights=load_weights), "seed": cfg.seed}
        self._logs = Path(cfg.run_dir).absolute() / "logs"
        self._logs.mkdir(parents=True, exist_ok=True)
        self.num_failures = 0
        _start_ray(cfg.engine.num_engines)
        self._slots = [self._start(i) for i in range(cfg.engine.num_engines)]
        self._starting: dict[ray.ObjectRef, Slot] = {}  # replacements

    def _start(self, index: int) -> Slot:
        log = self._logs / (f"engine_{index}.log" if not self.num_failures else f"engine_{index}.after_failure_{self.num_failures}.log")
        actor = ray.remote(Engine).options(
            num_cpus=1, num_gpus=1 if self._cuda else 0, max_concurrency=1000, runtime_env={"env_vars": _environment(self._cfg, self._cuda)})
        return Slot(index, log, actor.remote(self._args, str(log)))

    @property
    def ready(self) -> list[Slot]:
        """The engines that take part."""
        return [slot for slot in self._slots if slot.ready]

    def wait_until_ready(self) -> None:
        for slot in self._slots:
            slot.ready = True
        process_ids = self.wait(self.call("ready", [(self._stop_token_ids,)] * len(self._slots)), "engine start", self._cfg.start_timeout_s)
        for slot, process_id in zip(self._slots, process_ids, strict=True):
            slot.process_id = process_id

    def assemble(self, phase: str) -> list[Slot]:
        """The engines that take part from now on, for the caller to refit them: those that answer, and replacements that have started.

        Waits for one if none is left. Raises EngineError if a replacement could not start, or after engine.max_failures failures.
        """
        refs = {slot.actor.health.remote(): slot for slot in self.ready}
        answered, _ = ray.wait(list(refs), num_returns=len(refs), timeout=self._cfg.health_timeout_s) if refs else ([], [])
        for ref, slot in refs.items():
            with contextlib.suppress(EnginesLost):
                if ref not in answered:
                    self._lose(slot, phase, f"did not answer for {self._cfg.health_timeout_s:.0f} s")
                    continue
                try:
                    ray.get(ref)
                except ray.exceptions.RayError as e:
                    self._lose(slot, phase, _last_line(e))
        if self._starting:
            self._admit_replacements()
        return self.ready

    def _admit_replacements(self) -> None:
        done, _ = ray.wait(list(self._starting), num_returns=1, timeout=0 if self.ready else self._cfg.start_timeout_s)
        done, _ = ray.wait(list(self._starting), num_returns=len(self._starting), timeout=0) if done else (done, [])
        if not done and not self.ready:
            raise EngineError(f"engine start: no replacement was ready within {self._cfg.start_timeout_s:.0f} s. {next(iter(self._starting.values())).last_words()}")
        for ref in done:
            slot = self._starting.pop(ref)
            try:
                slot.process_id = ray.get(ref)
            except ray.exceptions.RayError as e:
                raise EngineError(f"engine start: the replacement of engine {slot.index} failed: {_last_line(e)}. {slot.last_words()}") from e
            slot.ready = True

    def generate(self, requests: Sequence[tuple[Sequence[int], Sampling]], phase: str) -> list[list[Completion]]:
        """The completions of each (prompt token ids, sampling), in order. Each goes to the engine with the fewest responses to sample.

        Raises EngineError after engine.max_failures failures of engines or rollout.timeout_s, EnginesLost if none is left.
        """
        for slot in self.ready:
            slot.pending.clear()  # of a call that was given up
        end = time.monotonic() + self._rollout_timeout_s
        out: dict[int, list[Completion]] = {}
        waiting = deque(range(len(requests)))
        while len(out) < len(requests):
            self._deal(requests, waiting)
            flying = {ref: slot for slot in self.ready for ref in slot.pending}
            done, _ = ray.wait(list(flying), num_returns=len(flying), timeout=0)
            if not done:
                done, _ = ray.wait(list(flying), num_returns=1, timeout=HEALTH_EVERY_S)
            for ref in done:
                slot = flying[ref]
                if not slot.ready:  # lost since
                    continue
                try:
                    out[slot.pending[ref]] = ray.get(ref)
                    del slot.pending[ref]
                except ray.exceptions.RayError as e:
                    waiting.extendleft(self._lose(slot, phase, _last_line(e)))
            for slot, problem in self._unhealthy():
                waiting.extendleft(self._lose(slot, phase, problem))
            if time.monotonic() > end:
                slot = max(self.ready, key=lambda slot: len(slot.pending))
                raise EngineError(f"{phase}: {len(requests) - len(out)} of {len(requests)} requests were not done within {self._rollout_timeout_s:.0f} s, "
                                  f"{len(slot.pending)} of them at engine {slot.index}. {slot.last_words()}")
        return [out[i] for i in range(len(requests))]

    def _deal(self, requests: Sequence[tuple[Sequence[int], Sampling]], waiting: deque[int]) -> None:
        """Hands out what is waiting: to each engine as much as it runs at once, and as much again, so that it never waits for more."""
        def load(slot: Slot) -> int:
            return sum(requests[i][1].num_responses for i in slot.pending.values())

        while waiting and self.ready:
            slot = min(self.ready, key=load)
            if slot.pending and load(slot) >= 2 * self._cfg.max_running_responses:
                return
            index = waiting.popleft()
            slot.pending[slot.actor.generate.remote(*requests[index])] = index

    def _unhealthy(self) -> list[tuple[Slot, str]]:
        """Engines that do not answer, or say that they cannot go on."""
        out = []
        for slot in self.ready:
            if slot.ping is None:
                slot.ping = slot.actor.health.remote(), time.monotonic()
                continue
            ref, sent = slot.ping
            if ray.wait([ref], timeout=0)[0]:
                slot.ping = None
                try:
                    ray.get(ref)
                except ray.exceptions.RayError as e:
                    out.append((slot, _last_line(e)))
            elif time.monotonic() - sent > self._cfg.health_timeout_s:
                out.append((slot, f"did not answer for {self._cfg.health_timeout_s:.0f} s"))
        return out

    def _lose(self, slot: Slot, phase: str, problem: str) -> list[int]:
        """Ends an engine, starts one in its place, and returns the requests that it leaves behind."""
        self.num_failures += 1
        left, slot.ready = sorted(slot.pending.values(), reverse=True), False
        what = f"{phase}: engine {slot.index} failed: {problem}. {slot.last_words()}"
        ray.kill(slot.actor)
        if slot.process_id and slot.process_id[0] == socket.gethostname():  # Ray asks a process to end itself: one that is stopped cannot
            with contextlib.suppress(ProcessLookupError):
                os.kill(slot.process_id[1], signal.SIGKILL)
        if self.num_failures > self._cfg.max_failures:
            raise EngineError(f"{what}\nfailure {self.num_failures} of engines, and engine.max_failures = {self._cfg.max_failures}")
        print(f"{what}\n{len(left)} of its requests go to the {len(self.ready)} other engines; a replacement is started", flush=True)
        self._slots[slot.index] = replacement = self._start(slot.index)
        self._starting[replacement.actor.ready.remote(self._stop_token_ids)] = replacement
        if not self.ready:
            raise EnginesLost(what)
        return left

    def call(self, method: str, args: Sequence[tuple]) -> list[ray.ObjectRef]:
        """Starts `method` on every engine that takes part, each with its own arguments; `wait` collects."""
        return [getattr(slot.actor, method).remote(*arg) for slot, arg in zip(self.ready, args, strict=True)]

    def wait(self, refs: Sequence[ray.ObjectRef], phase: str, timeout_s: float) -> list:
        """The results of `call`, or EngineError."""
        end, slots = time.monotonic() + timeout_s, self.ready
        pending = list(refs)
        while pending:
            done, pending = ray.wait(pending, num_returns=1, timeout=max(end - time.monotonic(), 0))
            for ref in done or pending:
                slot = slots[list(refs).index(ref)]
                if not done:
                    raise EngineError(f"{phase}: engine {slot.index} did not answer within {timeout_s:.0f} s. {slot.last_words()}")
                try:
                    ray.get(ref)
                except ray.exceptions.RayError as e:
                    raise EngineError(f"{phase}: engine {slot.index} failed: {_last_line(e)}. {slot.last_words()}") from e
        return ray.get(list(refs))

    def stop(self) -> None:
        for slot in self._slots:
            ray.kill(slot.actor)
        ray.shutdown()


def _last_line(e: BaseException) -> str:
    return str(e).strip().splitlines()[-1]


def _start_ray(num_engines: int) -> None:
    if "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=False)
        return
    ray.init(
        num_cpus=num_engines, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1",
        object_store_memory=256 << 20, configure_logging=True, logging_level="error")


def _environment(cfg: config.Engine, cuda: bool) -> dict[str, str]:
    env = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1"}
    if not cuda:
        env |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core is its own worker: one process less to start
            "TORCHDYNAMO_DISABLE": "1",  # two small samplers compile themselves at first use, 20 s, despite enforce_eager
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the default binds every engine to the same core
            "OMP_NUM_THREADS": str(cfg.num_threads),
            "OMP_WAIT_POLICY": "passive",  # spinning threads would take the trainer's core
        }
    return env


def _engine_args(cfg: config.Config, folder: str, *, cuda: bool, load_weights: bool) -> dict:
    args = dict(
        model=str(Path(folder).absolute()),
        dtype=cfg.engine.dtype,
        max_model_len=cfg.max_total_tokens,
        max_num_seqs=cfg.engine.max_running_responses,
        skip_tokenizer_init=True,
        generation_config="vllm",  # not the model folder's: it may carry a temperature or a top_p of its own
        logprobs_mode="processed_logprobs",  # those of the distribution that was sampled from
        load_format="auto" if load_weights else "dummy",
        weight_transfer_config={"backend": "grpo_mcore"},  # receiver.py's, for every transport
        worker_extension_cls="grpo_mcore.receiver.WorkerExtension",
        disable_log_stats=True,
    )
    if not cuda:
        args |= dict(
            enforce_eager=True,
            block_size=32,  # the CPU's default of 128 leaves short prompts without a prefix hit
            # A seeded request whose prompt is split over two engine steps rewinds its generator, which a CPU's cannot.
            enable_chunked_prefill=False,
            max_num_batched_tokens=max(cfg.max_total_tokens, 2048),
        )
    if cfg.engine.kv_cache_bytes is not None:
        args["kv_cache_memory_bytes"] = cfg.engine.kv_cache_bytes
    return args
