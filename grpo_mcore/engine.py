"""vLLM engines as Ray actors: token ids in, token ids and log-probs out. The engines never see text.

`Engines` is the driver's handle of all of them: it starts them, calls them with a deadline, and when one fails says which,
in which phase, with that engine's own last words.
"""

import asyncio
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ray

from grpo_mcore import config

LOADED = -1  # version of the weights an engine started with


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

    async def process_id(self) -> int:
        return os.getpid()

    async def ready(self, stop_token_ids: list[int]) -> None:
        self._stop_token_ids = stop_token_ids

    async def generate(self, requests: list[tuple[Sequence[int], Sampling]]) -> list[list[Completion]]:
        """Completions of each (prompt token ids, sampling), in order."""
        return await asyncio.gather(*(self._generate(ids, sampling) for ids, sampling in requests))

    async def _generate(self, token_ids: Sequence[int], sampling: Sampling) -> list[Completion]:
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

    async def init_transfer(self, init_info: dict) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info))

    async def receive(self, update_info: dict, version: int) -> None:
        """One whole refit: the sender streams while this runs."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self._llm.start_weight_update()
        await self._llm.update_weights(WeightTransferUpdateRequest(update_info=update_info))
        await self._llm.finish_weight_update()
        # Cached keys and values are those of the old weights.
        if not await self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache: requests are still running")
        self._version = version


class Engines:
    """All engines of a run; lives on the driver."""

    def __init__(self, cfg: config.Config, folder: str, *, cuda: bool, stop_token_ids: list[int], load_weights: bool = False):
        """Starts Ray (or joins the cluster of RAY_ADDRESS) and the engines, without waiting for them.

        Without `load_weights` an engine's weights are arbitrary until the first refit.
        """
        self._cfg, self._stop_token_ids = cfg.engine, stop_token_ids
        self._rollout_timeout_s = cfg.rollout.timeout_s
        logs = Path(cfg.run_dir).absolute() / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        self._logs = [logs / f"engine_{i}.log" for i in range(cfg.engine.num_engines)]
        _start_ray(cfg.engine.num_engines)
        actor = ray.remote(Engine).options(
            num_cpus=1, num_gpus=1 if cuda else 0, max_concurrency=1000, runtime_env={"env_vars": _environment(cfg.engine, cuda)})
        args = _engine_args(cfg, folder, cuda=cuda, load_weights=load_weights)
        self._actors = [actor.remote({**args, "seed": cfg.seed}, str(log)) for log in self._logs]

    def __len__(self) -> int:
        return len(self._actors)

    def wait_until_ready(self) -> None:
        self.wait(self.call("ready", [(self._stop_token_ids,)] * len(self)), "engine start", self._cfg.start_timeout_s)

    def generate(self, requests: Sequence[tuple[Sequence[int], Sampling]], phase: str) -> list[list[Completion]]:
        """The completions of each request, in order; requests are dealt out in turn."""
        shares = [list(requests[i :: len(self)]) for i in range(len(self))]
        answers = self.wait(self.call("generate", [(share,) for share in shares]), phase, self._rollout_timeout_s)
        out: list = [None] * len(requests)
        for i, answer in enumerate(answers):
            out[i :: len(self)] = answer
        return out

    def call(self, method: str, args: Sequence[tuple]) -> list[ray.ObjectRef]:
        """Starts `method` on every engine, each with its own arguments; `wait` collects."""
        return [getattr(a, method).remote(*arg) for a, arg in zip(self._actors, args, strict=True)]

    def wait(self, refs: Sequence[ray.ObjectRef], phase: str, timeout_s: float) -> list:
        """The results, or EngineError."""
        end = time.monotonic() + timeout_s
        pending = list(refs)
        while pending:
            done, pending = ray.wait(pending, num_returns=1, timeout=max(end - time.monotonic(), 0))
            for ref in done or pending:
                index = list(refs).index(ref)
                if not done:
                    raise EngineError(f"{phase}: engine {index} did not answer within {timeout_s:.0f} s. {self._last_words(index)}")
                try:
                    ray.get(ref)
                except ray.exceptions.RayError as e:
                    raise EngineError(f"{phase}: engine {index} failed: {str(e).strip().splitlines()[-1]}. {self._last_words(index)}") from e
        return ray.get(list(refs))

    def _last_words(self, index: int) -> str:
        log = self._logs[index]
        lines = log.read_text(errors="replace").splitlines()[-15:] if log.is_file() else []
        return f"The end of {log}:\n  " + "\n  ".join(lines or ["(empty)"])

    def stop(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
        ray.shutdown()


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
        weight_transfer_config={"backend": "nccl" if cuda else "gloo"},
        disable_log_stats=True,
    )
    if not cuda:
        args |= dict(
            worker_extension_cls="grpo_mcore.gloo_receiver.WorkerExtension",
            enforce_eager=True,
            block_size=32,  # the CPU's default of 128 leaves short prompts without a prefix hit
            # A seeded request whose prompt is split over two engine steps rewinds its generator, which a CPU's cannot.
            enable_chunked_prefill=False,
            max_num_batched_tokens=max(cfg.max_total_tokens, 2048),
        )
    if cfg.engine.kv_cache_bytes is not None:
        args["kv_cache_memory_bytes"] = cfg.engine.kv_cache_bytes
    return args
