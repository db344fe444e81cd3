"""Policy weights -> engines, in memory: streamed tensor by tensor from the Megatron shards, stamped, attested.

Attested: after every refit the engines score fixed canary tokens, and their log-probs are compared with the trainer's. A
tensor that did not arrive, arrived in a wrong layout or was served from a stale copy shows there, before a
single token is sampled with it.
"""

import time
from collections.abc import Sequence

import torch

from grpo_mcore import batch, config, hf_weights, metrics, model
from grpo_mcore.engine import Engines
from grpo_mcore.parallel.topology import Topology
from grpo_mcore.policy import Policy
from grpo_mcore.types import Prompt, Response
from grpo_mcore.weight_transfer import GlooSender, NcclSender, TensorInfo, update_info


class RefitError(RuntimeError):
    """The engines do not compute what the trainer computes."""


class Refit:
    """Call it with the version of the weights. Collective: every trainer rank must call it."""

    def __init__(self, policy: Policy, engines: Engines | None, cfg: config.Config, topology: Topology, canary: Sequence[Sequence[int]]):
        """`engines` is None on all ranks but the driver; `canary` are token sequences of at least 2 tokens."""
        self._policy, self._engines, self._cfg, self._topology = policy, engines, cfg.refit, topology
        self._canary = [list(ids) for ids in canary]
        self._packing = model.packing(policy.hf_config, topology, cfg.precision, max_tokens=sum(map(len, canary)))
        dtype = getattr(torch, cfg.engine.dtype)
        self._infos = [TensorInfo(name, dtype, shape) for name, shape in hf_weights.shapes(policy.hf_config).items()]
        exact = cfg.engine.dtype == cfg.precision.params == "float32"
        self._tolerance = cfg.refit.canary_tolerance or (1e-3 if exact else 0.15)
        self._members: list[int] = []  # of the transfer group

    def _join(self) -> None:
        """Makes a transfer group of the sender and all engines that take part, if they are others than those of the last one."""
        members = [id(slot) for slot in self._engines.assemble("refit")]
        if members == self._members:
            return
        sender = NcclSender if self._topology.device.type == "cuda" else GlooSender
        self._sender = sender("127.0.0.1", 1 + len(members), self._cfg.bucket_bytes, self._cfg.timeout_s)
        refs = self._engines.call("init_transfer", [(self._sender.init_info(1 + i),) for i in range(len(members))])
        self._sender.open()
        self._engines.wait(refs, "refit (joining the transfer group)", self._cfg.timeout_s)
        self._members = members

    def __call__(self, version: int) -> dict[str, metrics.Metric]:
        """The driver's metrics (elsewhere none). Raises EngineError if an engine fails or is late, RefitError if the canary differs."""
        start = time.perf_counter()
        stream = (tensor for _, tensor in self._policy.export())
        if self._engines is None:
            for _ in stream:  # this rank's part in the gathering
                pass
        else:
            self._join()
            refs = self._engines.call("receive", [(update_info(self._infos), version)] * len(self._members))
            try:
                self._sender.send(self._infos, stream)
            except RuntimeError as e:
                self._engines.wait(refs, f"refit to version {version}", 5.0)
                raise RefitError(f"refit to version {version}: sending failed: {e}") from e
            self._engines.wait(refs, f"refit to version {version}", self._cfg.timeout_s)
        seconds = time.perf_counter() - start
        error = self._attest(version)
        if self._engines is None:
            return {}
        return {
            "refit/canary_abs_mean": metrics.Mean(error, 1),
            "refit/engines": metrics.Mean(len(self._members), 1),
            "refit/bytes": metrics.Mean(float(sum(i.num_bytes for i in self._infos)), 1),
            "refit/seconds": metrics.Mean(seconds, 1),
        }

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
