"""Policy weights -> engines, in memory: streamed tensor by tensor from the Megatron shards, stamped, attested.

Attested: after every refit the engines score fixed canary tokens, and their log-probs are compared with the trainer's. A
tensor that did not arrive, arrived in a wrong layout or was served from a stale copy shows there, before a
single token is sampled with it.
"""

import functools
import socket
import time
from collections.abc import Callable, Sequence

import ray
import torch

from grpo_mcore import batch, config, hf_weights, metrics, model
from grpo_mcore.engine import EngineError, Engines
from grpo_mcore.parallel import collectives
from grpo_mcore.parallel.topology import Topology
from grpo_mcore.policy import Policy
from grpo_mcore.senders import BrokenWire, GlooSender, IpcSender, NcclSender, Place, SharedSender, Stream, choose
from grpo_mcore.types import Prompt, Response
from grpo_mcore.weight_transfer import TensorInfo, num_bytes, ranks, to_dict

FAILED_ENGINE_S = 5.0  # for an engine to say what it failed of


class RefitError(RuntimeError):
    """The engines do not compute what the trainer computes."""


class Refit:
    """Call it with the version of the weights. Collective: every trainer rank must call it."""

    def __init__(self, policy: Policy, engines: Engines | None, cfg: config.Config, topology: Topology, canary: Sequence[Sequence[int]]):
        """`engines` is None on all ranks but the driver; `canary` are token sequences of at least 2 tokens."""
        self._policy, self._engines, self._cfg, self._topology = policy, engines, cfg.refit, topology
        self._canary = [list(ids) for ids in canary]
        self._packing = model.packing(policy.hf_config, topology, cfg.precision, max_tokens=sum(map(len, canary)))
        self._dtype = getattr(torch, cfg.engine.dtype)
        self._groups = [[TensorInfo(name, self._dtype, shape) for name, shape in group.items()] for group in hf_weights.groups(policy.hf_config)]
        gpu = str(torch.cuda.get_device_properties(topology.device).uuid) if topology.device.type == "cuda" else ""
        self._trainers = collectives.gather(Place(socket.gethostname(), gpu), topology)
        exact = cfg.engine.dtype == cfg.precision.params == "float32"
        self._tolerance = cfg.refit.canary_tolerance or (1e-3 if exact else 0.15)
        self._members: list[int] = []  # of the transfer
        self._transport: str | None = None
        self._sender = IpcSender(topology)  # the one that every rank has

    def _join(self) -> str:
        """Connects the sender with all engines that take part, if they are others than those of the last refit; returns the transport."""
        members = [id(slot) for slot in self._engines.assemble("refit")]
        if members == self._members:
            return self._transport
        self._sender.close()
        self._members = []
        places = self._wait(self._engines.call("places", [()] * len(members)), "asking for the engines' places")
        self._transport = choose(self._cfg.transport, [[Place(*place) for place in engine] for engine in places], self._trainers)
        first_ranks, world_size = ranks([len(engine) for engine in places])
        address, bucket_bytes, timeout_s = _address(), self._cfg.bucket_bytes, self._cfg.timeout_s
        stream = Stream(self._groups, bucket_bytes, lambda into: iter(()))
        self._sender = {
            "gloo": lambda: GlooSender(stream, address, world_size, timeout_s),
            "nccl": lambda: NcclSender(bucket_bytes, address, world_size),
            "shared_memory": lambda: SharedSender(stream),
            "ipc": lambda: IpcSender(self._topology),
        }[self._transport]()
        weights = to_dict(stream.infos)
        refs = self._engines.call("init_transfer", [
            ({"transport": self._transport, "weights": weights, "info": self._sender.init_info(first)},) for first in first_ranks])
        self._sender.open()
        self._wait(refs, "joining the transfer")
        self._members = members
        return self._transport

    def __call__(self, version: int) -> dict[str, metrics.Metric]:
        """The driver's metrics (elsewhere none). Raises EngineError if an engine fails or is late, RefitError if the canary differs."""
        start = time.perf_counter()
        transport = collectives.broadcast(self._join() if self._engines is not None else None, self._topology)
        export = functools.partial(self._policy.export, dtype=self._dtype, everywhere=transport == "ipc")
        stream = Stream(self._groups, self._cfg.bucket_bytes, export)
        if self._engines is not None:
            self._send(stream, version)
        elif transport == "ipc":
            self._sender.send(stream, None)
        stream.drain()
        seconds = time.perf_counter() - start
        error = self._attest(version)
        if self._engines is None:
            return {}
        size = num_bytes(stream.infos)
        return {
            "refit/canary_abs_mean": metrics.Mean(error, 1),
            "refit/engines": metrics.Mean(len(self._members), 1),
            "refit/bytes": metrics.Mean(float(size), 1),
            "refit/gb_per_s": metrics.Mean(size / 1e9 / seconds, 1),
            "refit/seconds": metrics.Mean(seconds, 1),
        }

    def _send(self, stream: Stream, version: int) -> None:
        """The stream to the engines. Whatever fails, the stream is drained: the other ranks take part in what is left of it."""
        phase, began = f"refit to version {version}", self._call("begin_refit")
        loading: list[ray.ObjectRef] = []

        def update(info: dict, what: str) -> Callable[[], object]:
            self._wait(began, f"{phase}: beginning")
            loading[:] = refs = self._call("load_weights", info)
            return lambda: self._wait(refs, f"{phase}: {what}")

        try:
            self._sender.send(stream, update)
            self._wait(self._call("end_refit", version), f"{phase}: ending")
        except (EngineError, RuntimeError, OSError) as e:
            self._members = []  # whoever sends next joins anew
            at = stream.at
            self._sender.close()
            stream.drain()
            if isinstance(e, EngineError):
                raise
            if isinstance(e, BrokenWire):  # an engine that failed says why
                self._engines.wait(loading, f"{phase}: sending {at}", FAILED_ENGINE_S)
            raise RefitError(f"{phase}: sending {at} failed: {e}") from e

    def _call(self, method: str, *args) -> list[ray.ObjectRef]:
        return self._engines.call(method, [args] * len(self._members))

    def _wait(self, refs: list[ray.ObjectRef], phase: str) -> list:
        return self._engines.wait(refs, phase, self._cfg.timeout_s)

    def _attest(self, version: int) -> float:
        """Mean |engine - trainer| log-prob over the canary tokens, of the worst engine (0 on ranks without engines)."""
        samples = [
            batch.Sample(Prompt(0, "", "", tuple(ids[:1])), Response(tuple(ids[1:]), (0.0,) * (len(ids) - 1), False, version), 0.0)
            for ids in self._canary
        ]
        packed = batch.microbatch(samples, [0.0] * len(samples), self._packing)
        ours = self._policy.logprobs_everywhere(packed, temperature=1.0)
        if self._engines is None:
            return 0.0
        answers = self._engines.wait(self._engines.call("score", [(self._canary,)] * len(self._members)), f"canary of version {version}", self._cfg.timeout_s)
        worst = 0.0
        for index, answer in zip((slot.index for slot in self._engines.ready), answers, strict=True):
            theirs = torch.tensor([lp for sequence in answer for lp in sequence])
            difference = (theirs - ours).abs()
            error = difference.mean().item()
            if not error <= self._tolerance:  # NaN fails too
                at = int(difference.nan_to_num(float("inf")).argmax())
                raise RefitError(
                    f"refit to version {version}: engine {index} does not compute what the trainer computes: mean |engine - trainer| "
                    f"log-prob of {len(theirs)} canary tokens is {error:.3g}, tolerance {self._tolerance:g}; worst at canary token {at}: "
                    f"engine {theirs[at]:.4f}, trainer {ours[at]:.4f}. If the engines' arithmetic is coarser than the trainer's, raise refit.canary_tolerance.")
            worst = max(worst, error)
        return worst


def _address() -> str:
    """Where this process's node is reached by the others of Ray's cluster."""
    mine = ray.get_runtime_context().get_node_id()
    return next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == mine)
