"""Policy weights -> engines, in memory: streamed tensor by tensor from the Megatron shards, stamped, attested.

Attested: after every refit the engines score fixed canary tokens, and their log-probs are compared with the trainer's.
A tensor that did not arrive, arrived in a wrong layout or was served from a stale copy shows there, before a
single token that was sampled with it leaves the engine.

An engine that dies, hangs or differs from the trainer is replaced, and the others go on. Where that does not explain
it, because all differ or the transfer broke between healthy ends, the refit is done again, ATTEMPTS times in all.
"""

import contextlib
import functools
import socket
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import Future

import torch

from grpo_mcore.config import config
from grpo_mcore.loss import batch
from grpo_mcore.parallel import collectives
from grpo_mcore.parallel.topology import Topology
from grpo_mcore.policy import hf_weights, model
from grpo_mcore.policy.policy import Policy
from grpo_mcore.refit.senders import (
    BrokenWire,
    GlooSender,
    IpcSender,
    NcclSender,
    Place,
    Sender,
    SharedSender,
    Stream,
    choose,
)
from grpo_mcore.refit.weight_transfer import TensorInfo, num_bytes, ranks, to_dict
from grpo_mcore.report import metrics
from grpo_mcore.rollout.engines import Engines, Slot
from grpo_mcore.types import Prompt, Response

ATTEMPTS = 3
FAILED_ENGINE_S = 5.0  # for an engine to say what it failed of


class RefitError(config.RunError):
    """The weights do not reach the engines, or the engines do not compute what the trainer computes."""


class Refit:
    """Call it with the version of the weights. Collective: every trainer rank must call it."""

    def __init__(
        self,
        policy: Policy,
        engines: Engines | None,
        cfg: config.Config,
        topology: Topology,
        canary: Sequence[Sequence[int]],
    ):
        """`engines` is None on all ranks but the driver; `canary` are token sequences of at least 2 tokens."""
        self._policy, self._topology = policy, topology
        self._canary = [list(ids) for ids in canary]
        self._packing = model.packing(policy.hf_config, topology, cfg.precision, max_tokens=sum(map(len, canary)))
        self._dtype = getattr(torch, cfg.engine.dtype)
        self._groups = [
            [TensorInfo(name, self._dtype, shape) for name, shape in group.items()]
            for group in hf_weights.groups(policy.hf_config)
        ]
        self._bucket_bytes = cfg.refit.bucket_bytes or (256 << 20 if topology.device.type == "cuda" else 8 << 20)
        gpu = str(torch.cuda.get_device_properties(topology.device).uuid) if topology.device.type == "cuda" else ""
        trainers = collectives.gather(Place(socket.gethostname(), gpu), topology)
        exact = cfg.engine.dtype == cfg.precision.params == "float32" and cfg.engine.quantization is None
        self._tolerance = cfg.refit.canary_tolerance or (
            1e-3 if exact else 0.15 if cfg.engine.quantization is None else 0.5
        )
        self.transfer: Transfer | None = None  # the driver's alone
        if engines is not None:
            announced = Stream(self._groups, self._bucket_bytes, lambda into: iter(()))
            self.transfer = Transfer(engines, cfg, topology, trainers, announced)

    def __call__(self, version: int) -> dict[str, metrics.Metric]:
        """The driver's metrics (elsewhere none).

        Raises EngineError after engine.max_failures failures of engines, RefitError if the transfer or the canary fails
        ATTEMPTS times, InputError if the engines are not where refit.transport needs them.
        """
        start = time.perf_counter()
        with self.transfer.engines.refitting() if self.transfer is not None else contextlib.nullcontext():
            for attempt in range(1, ATTEMPTS + 1):
                if not self._deliver(version, again=attempt > 1):
                    continue
                seconds, error = time.perf_counter() - start, self._attest(version)
                if error is not None:
                    break
            else:
                problem = self.transfer.problem if self.transfer is not None else ""
                raise RefitError(f"refit to version {version}, {ATTEMPTS} times: {problem}")
        if self.transfer is None:
            return {}
        size = sum(map(num_bytes, self._groups))
        return {
            "refit/canary_abs_mean": metrics.Mean(error, 1),
            "refit/engines": metrics.Mean(len(self.transfer.members), 1),
            "refit/attempts": metrics.Mean(attempt, 1),
            "refit/bytes": metrics.Mean(float(size), 1),
            "refit/gb_per_s": metrics.Mean(size / 1e9 / seconds, 1),
            "refit/seconds": metrics.Mean(seconds, 1),
        }

    def _deliver(self, version: int, *, again: bool) -> bool:
        """Whether all engines that take part have the weights. Collective."""
        driver = self.transfer
        transport = collectives.broadcast(driver.join(version) if driver is not None else None, self._topology)
        if transport is None:
            return False
        export = functools.partial(self._policy.export, dtype=self._dtype, everywhere=transport == "ipc")
        stream = Stream(self._groups, self._bucket_bytes, export)
        problem = None
        try:
            if driver is not None:
                driver.send(stream, version, discard=again)
            elif transport == "ipc":
                IpcSender(self._topology).send(stream, None)
        except (RuntimeError, OSError) as e:
            problem = f"sending {stream.at}: {e}"
            if stream.torn and self._topology.world_size > 1:  # the other ranks wait in its collectives
                raise RefitError(f"refit to version {version}: {problem}") from e
        if problem is not None and driver is not None:
            driver.fail(version, problem)
        stream.drain()  # whatever failed, the other ranks take part in what is left of it
        return collectives.broadcast(problem is None, self._topology)

    def _attest(self, version: int) -> float | None:
        """Mean |engine - trainer| log-prob over the canary tokens, of the worst engine that is left; None if the refit
        must be done again. Collective."""
        samples = [
            batch.Sample(
                Prompt(0, "", "", tuple(ids[:1])), Response(tuple(ids[1:]), (0.0,) * (len(ids) - 1), False), 0.0
            )
            for ids in self._canary
        ]
        packed = batch.microbatch(samples, [0.0] * len(samples), self._packing)
        driver = self.transfer
        scoring = driver.start_scoring(self._canary) if driver is not None else {}
        ours = self._policy.logprobs_everywhere(packed, temperature=1.0)  # meanwhile
        error = driver.attest(version, scoring, ours, self._tolerance) if driver is not None else None
        return collectives.broadcast(error, self._topology)


class Transfer:
    """The driver's end of a refit: the engines that take part, and the sender that they are connected with."""

    def __init__(
        self, engines: Engines, cfg: config.Config, topology: Topology, trainers: Sequence[Place], announced: Stream
    ):
        """`trainers`: where each rank is. `announced`: a stream like those to be sent."""
        self.engines, self._cfg, self._topology, self._trainers = engines, cfg.refit, topology, trainers
        self.keep_cache = cfg.rollout.cache_after_refit == "keep"
        self._announced = announced
        self._sender: Sender = IpcSender(topology)  # until the first join
        self.members: list[Slot] = []
        self.transport: str | None = None
        self.problem = ""  # why the last attempt failed

    def join(self, version: int) -> str | None:
        """Connects the sender with all engines that take part, if they are others than those of the last refit. The
        transport, or None if that failed."""
        members = self.engines.assemble(f"refit to version {version}")
        if members == self.members:
            return self.transport
        self._sender.close()
        try:
            self._connect(members)
        except (RuntimeError, OSError) as e:
            self.fail(version, f"joining the transfer: {e}")
            return None
        self.members = members
        return self.transport

    def _connect(self, members: list[Slot]) -> None:
        of_engine = self.settle(self.engines.call(members, "places"), "asking for its place")
        places = [[Place(*place) for place in of_engine[slot]] for slot in members]
        self.transport = choose(self._cfg.transport, places, self._trainers)
        first_ranks, world_size = ranks([len(engine) for engine in places])
        address, timeout_s = self.engines.address, self._cfg.timeout_s
        senders: dict[str, Callable[[], Sender]] = {
            "gloo": lambda: GlooSender(self._announced, address, world_size, timeout_s),
            "nccl": lambda: NcclSender(
                self._announced.bucket_bytes, address, world_size, timeout_s, self._topology.device
            ),
            "shared_memory": lambda: SharedSender(self._announced, world_size, timeout_s),
            "ipc": lambda: IpcSender(self._topology),
        }
        self._sender = senders[self.transport]()
        common = {"transport": self.transport, "weights": to_dict(self._announced.infos)}
        each = [({**common, "info": self._sender.init_info(first)},) for first in first_ranks]
        refs = self.engines.call(members, "init_transfer", each)
        self.settle(refs, "joining", beside=self._sender.open())

    def send(self, stream: Stream, version: int, *, discard: bool) -> None:
        """Raises RuntimeError, OSError."""
        began = self.engines.call(self.members, "begin_refit", (discard,))
        loading: dict = {}

        def update(info: dict, what: str) -> Callable[..., object]:
            nonlocal loading
            self.settle(began, "pausing")
            loading = refs = self.engines.call(self.members, "load", (info,))
            return lambda beside=None: self.settle(refs, what, beside=beside)

        try:
            self._sender.send(stream, update)
        except BrokenWire:
            self.settle(loading, "receiving", FAILED_ENGINE_S)  # an engine that failed says why
            raise
        self.settle(self.engines.call(self.members, "end_refit", (version, self.keep_cache)), "ending")

    def settle(self, refs: dict, what: str, timeout_s: float | None = None, beside: Future | None = None) -> dict:
        """The results by engine. Raises RuntimeError for the first that failed, with its last words. `beside`: what
        this process does meanwhile."""
        timeout_s = timeout_s or self._cfg.timeout_s
        if beside is not None:
            self._settle_beside(refs, what, timeout_s, beside)
        results, failed = self.engines.collect(refs, timeout_s)
        for slot, problem in failed.items():
            raise RuntimeError(f"{what}: engine {slot.index} failed: {problem}. {slot.last_words()}")
        return results

    def _settle_beside(self, refs: dict, what: str, timeout_s: float, beside: Future) -> None:
        """Until all are done. Where one fails, this process and the other engines may wait for it for ever: the first
        failure is enough."""
        answers = {slot: ref.future() for slot, ref in refs.items()}
        futures.wait([beside, *answers.values()], timeout_s, futures.FIRST_EXCEPTION)
        if beside.done() and beside.exception() is not None:
            futures.wait(answers.values(), FAILED_ENGINE_S, futures.FIRST_EXCEPTION)  # an engine that failed says why
        ended = {slot: answer for slot, answer in answers.items() if answer.done()}
        self.settle({slot: refs[slot] for slot, answer in ended.items() if answer.exception() is not None}, what)
        if beside.done():
            beside.result()
        if late := [slot for slot in refs if slot not in ended]:
            names = ", ".join(str(slot.index) for slot in late)
            raise RuntimeError(f"{what}: not done within {timeout_s:.0f} s: engine {names}. {late[0].last_words()}")
        if not beside.done():
            raise RuntimeError(f"{what}: the engines were done within {timeout_s:.0f} s, but not the trainer")

    def fail(self, version: int, problem: str) -> None:
        self.problem, self.members = problem, []  # whoever sends next joins anew
        self._sender.close()
        print(f"refit to version {version}: {problem}\nit is done again", flush=True)

    def start_scoring(self, canary: list[list[int]]) -> dict:
        return self.engines.call(self.members, "score", (canary,))

    def attest(self, version: int, scoring: dict, ours: torch.Tensor, tolerance: float) -> float | None:
        """The mean error of the worst engine within the tolerance, after the others were lost; None if all are
        beyond it. `ours`: the trainer's log-probs of the canary, one behind the other."""
        answers, failed = self.engines.collect(scoring, self._cfg.timeout_s)
        errors = {}
        for slot, answer in answers.items():
            theirs = torch.tensor([lp for sequence in answer for lp in sequence])
            difference = (theirs - ours).abs()
            error = difference.mean().item()
            if error <= tolerance:
                errors[slot] = error
                continue
            at = int(difference.nan_to_num(float("inf")).argmax())  # NaN is wrong too
            failed[slot] = (
                f"does not compute what the trainer computes: mean |engine - trainer| log-prob of {len(theirs)} "
                f"canary tokens is {error:.3g}, tolerance {tolerance:g}; worst at canary token {at}: engine "
                f"{theirs[at]:.4f}, trainer {ours[at]:.4f}. "
                "If the engines' arithmetic is coarser than the trainer's, raise refit.canary_tolerance"
            )
        if not errors:  # none is right: it is not the engines' doing
            slot, problem = next(iter(failed.items()))
            self.problem = f"engine {slot.index} {problem}"
            return None
        for slot, problem in failed.items():
            self.engines.lose(slot, f"refit to version {version}", problem)
        self.members = list(errors)
        # Who fails here is found by its health.
        self.engines.collect(self.engines.call(self.members, "release"), self._cfg.timeout_s)
        return max(errors.values())
