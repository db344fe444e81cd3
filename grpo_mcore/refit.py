"""Policy weights -> engines, in memory: streamed tensor by tensor from the Megatron shards, stamped, attested.

Attested: after every refit the engines score fixed canary tokens, and their log-probs are compared with the trainer's. A
tensor that did not arrive, arrived in a wrong layout or was served from a stale copy shows there, before a
single token that was sampled with it leaves the engine.

An engine that dies, hangs or differs from the trainer is replaced, and the others go on. Where that does not explain it, because all
differ or the transfer broke between healthy ends, the refit is done again, ATTEMPTS times in all.
"""

import contextlib
import time
from collections.abc import Sequence

import torch

from grpo_mcore import batch, config, hf_weights, metrics, model
from grpo_mcore.engines import Engines, Slot
from grpo_mcore.parallel import collectives
from grpo_mcore.parallel.topology import Topology
from grpo_mcore.policy import Policy
from grpo_mcore.types import Prompt, Response
from grpo_mcore.weight_transfer import GlooSender, NcclSender, TensorInfo, update_info


ATTEMPTS = 3


class RefitError(RuntimeError):
    """The engines do not compute what the trainer computes."""


class Refit:
    """Call it with the version of the weights. Collective: every trainer rank must call it."""

    def __init__(self, policy: Policy, engines: Engines | None, cfg: config.Config, topology: Topology, canary: Sequence[Sequence[int]]):
        """`engines` is None on all ranks but the driver; `canary` are token sequences of at least 2 tokens."""
        self._policy, self._engines, self._cfg, self._topology = policy, engines, cfg.refit, topology
        self._keep_cache = cfg.rollout.cache_after_refit == "keep"
        self._canary = [list(ids) for ids in canary]
        self._packing = model.packing(policy.hf_config, topology, cfg.precision, max_tokens=sum(map(len, canary)))
        dtype = getattr(torch, cfg.engine.dtype)
        self._infos = [TensorInfo(name, dtype, shape) for name, shape in hf_weights.shapes(policy.hf_config).items()]
        exact = cfg.engine.dtype == cfg.precision.params == "float32" and cfg.engine.quantization is None
        self._tolerance = cfg.refit.canary_tolerance or (1e-3 if exact else 0.15 if cfg.engine.quantization is None else 0.5)
        self._members: list[Slot] = []  # of the transfer group
        self._problem = ""  # why the last attempt failed

    def __call__(self, version: int) -> dict[str, metrics.Metric]:
        """The driver's metrics (elsewhere none).

        Raises EngineError after engine.max_failures failures of engines, RefitError if the transfer or the canary fails ATTEMPTS times.
        """
        start = time.perf_counter()
        with self._engines.refitting() if self._engines else contextlib.nullcontext():
            for attempt in range(1, ATTEMPTS + 1):
                if not collectives.broadcast(self._deliver(version, again=attempt > 1), self._topology):
                    continue
                seconds, error = time.perf_counter() - start, self._attest(version)
                if collectives.broadcast(error, self._topology) is not None:
                    break
            else:
                raise RefitError(f"refit to version {version}, {ATTEMPTS} times: {self._problem}")
        if self._engines is None:
            return {}
        return {
            "refit/canary_abs_mean": metrics.Mean(error, 1),
            "refit/engines": metrics.Mean(len(self._members), 1),
            "refit/attempts": metrics.Mean(attempt, 1),
            "refit/bytes": metrics.Mean(float(sum(i.num_bytes for i in self._infos)), 1),
            "refit/seconds": metrics.Mean(seconds, 1),
        }

    def _join(self, members: list[Slot]) -> None:
        """Makes a transfer group of the sender and these engines, if they are others than those of the last one."""
        if members == self._members:
            return
        sender = NcclSender if self._topology.device.type == "cuda" else GlooSender
        self._sender = sender(self._engines.address, 1 + len(members), self._cfg.bucket_bytes, self._cfg.timeout_s)
        refs = self._engines.call(members, "init_transfer", [(self._sender.init_info(1 + i),) for i in range(len(members))])
        self._sender.open()
        self._raise(self._engines.collect(refs, self._cfg.timeout_s)[1], "joining the transfer group")
        self._members = members

    def _deliver(self, version: int, *, again: bool) -> bool:
        """Whether all engines that take part have the weights. Collective."""
        stream = (tensor for _, tensor in self._policy.export())
        if self._engines is None:
            for _ in stream:  # this rank's part in the gathering
                pass
            return True
        members = self._engines.assemble(f"refit to version {version}")
        try:
            self._join(members)
            self._raise(self._engines.collect(self._engines.call(members, "begin_refit"), self._cfg.timeout_s)[1], "pausing")
            if again:
                self._raise(self._engines.collect(self._engines.call(members, "discard"), self._cfg.timeout_s)[1], "discarding what was sampled")
            refs = self._engines.call(members, "load", (update_info(self._infos),))
            try:
                self._sender.send(self._infos, stream)
            except RuntimeError as e:
                failed = self._engines.collect(refs, 5.0)[1]
                self._raise(failed, f"sending failed ({e})")
                raise
            self._raise(self._engines.collect(refs, self._cfg.timeout_s)[1], "loading")
            self._raise(self._engines.collect(self._engines.call(members, "end_refit", (version, self._keep_cache)), self._cfg.timeout_s)[1], "going on")
            return True
        except RuntimeError as e:
            self._problem, self._members = str(e), []
            print(f"refit to version {version}: {e}; it is done again", flush=True)
            return False
        finally:
            for _ in stream:  # the other ranks gather to the end
                pass

    def _raise(self, failed: dict[Slot, str], what: str) -> None:
        for slot, problem in failed.items():
            raise RuntimeError(f"{what}: engine {slot.index} failed: {problem}. {slot.last_words()}")

    def _attest(self, version: int) -> float | None:
        """Mean |engine - trainer| log-prob over the canary tokens, of the worst engine that is left; None if the refit must be done again. Collective."""
        samples = [
            batch.Sample(Prompt(0, "", "", tuple(ids[:1])), Response(tuple(ids[1:]), (0.0,) * (len(ids) - 1), False), 0.0)
            for ids in self._canary
        ]
        packed = batch.microbatch(samples, [0.0] * len(samples), self._packing)
        ours = self._policy.logprobs_everywhere(packed, temperature=1.0)
        if self._engines is None:
            return None
        answers, failed = self._engines.collect(self._engines.call(self._members, "score", (self._canary,)), self._cfg.timeout_s)
        errors = {}
        for slot, answer in answers.items():
            theirs = torch.tensor([lp for sequence in answer for lp in sequence])
            difference = (theirs - ours).abs()
            error = difference.mean().item()
            if error <= self._tolerance:
                errors[slot] = error
                continue
            at = int(difference.nan_to_num(float("inf")).argmax())  # NaN is wrong too
            failed[slot] = (
                f"does not compute what the trainer computes: mean |engine - trainer| log-prob of {len(theirs)} canary tokens is {error:.3g}, "
                f"tolerance {self._tolerance:g}; worst at canary token {at}: engine {theirs[at]:.4f}, trainer {ours[at]:.4f}. "
                "If the engines' arithmetic is coarser than the trainer's, raise refit.canary_tolerance")
        if not errors:  # none is right: it is not the engines' doing
            slot, problem = next(iter(failed.items()))
            self._problem = f"engine {slot.index} {problem}"
            return None
        for slot, problem in failed.items():
            self._engines.lose(slot, f"refit to version {version}", problem)
        self._members = list(errors)
        self._engines.collect(self._engines.call(self._members, "release"), self._cfg.timeout_s)  # who fails here is found by its health
        return max(errors.values())
