"""The policy: Megatron's model, DDP and optimizer, and the two things a step asks of them: log-probs and an update."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from grpo_mcore.config import config
from grpo_mcore.kernels.pick import pick_grpo
from grpo_mcore.loss.loss import of_rows
from grpo_mcore.parallel import collectives, context, pipeline
from grpo_mcore.parallel.topology import Topology
from grpo_mcore.policy import hf_weights, model
from grpo_mcore.policy.logprob import logprobs_and_entropy, loss_and_logprobs
from grpo_mcore.report import metrics
from grpo_mcore.types import GlobalBatch, Microbatch

# (current_logprobs_R, entropy_R, microbatch) -> (loss, statistics [R] by name)
LossFunction = Callable[[torch.Tensor, torch.Tensor, Microbatch], tuple[torch.Tensor, dict[str, torch.Tensor]]]


class FrozenPolicy:
    """Scores, never learns: the reference of the KL term."""

    def __init__(
        self,
        folder: str,
        topology: Topology,
        *,
        precision: config.Precision,
        temperature: float,
        kernels: config.Kernels = config.Kernels(),
        pointwise: bool | None = None,
        load_weights: bool = True,
    ):
        """`folder` is a Hugging Face folder; log-probs are taken of logits / temperature. Without `load_weights`, of
        which a benchmark has no need, its config.json is enough, and the weights are Megatron's random ones.

        pointwise: whether the loss is (loss.is_pointwise) that is learnt from, here or where these log-probs go; None:
        not said, and taken for no.
        """
        self.folder, self.topology, self.precision = folder, topology, precision
        self.temperature, self.kernels = temperature, kernels
        self.linear_grpo = None
        if pointwise is not None:
            self.linear_grpo = pick_grpo(
                kernels.linear_logprob,
                topology.device,
                kernels.workspace_bytes,
                wanted=kernels.linear_grpo,
                pointwise=pointwise,
            )
        self.hf_config = model.load_hf_config(folder)
        self.chunks = model.build(self.hf_config, topology=topology, precision=precision)
        if load_weights:
            hf_weights.load(self.chunks, self.hf_config, folder, topology)
        # What the schedule calls.
        self.modules: list[model.Backbone | DistributedDataParallel] = [
            chunk.requires_grad_(False) for chunk in self.chunks
        ]

    @torch.no_grad()
    def logprobs(
        self, microbatches: Sequence[Microbatch], *, temperature: float | None = None
    ) -> list[torch.Tensor | None]:
        """float32 [R] per microbatch, on the CPU; Nones but on the last stage. `temperature` None: the policy's own.
        Collective."""
        outputs = pipeline.run(
            self.modules, list(microbatches), lambda chunk, m: self._score(chunk, m, temperature or self.temperature)
        )
        return [None if output is None else output[0].cpu() for output in outputs]

    def logprobs_everywhere(self, batch: Microbatch, *, temperature: float) -> torch.Tensor:
        """float32 [R] of one microbatch that every data rank holds, before its cp split, on every rank. Collective."""
        (mine,) = self.logprobs([batch], temperature=temperature)
        t = self.topology
        parts = collectives.gather((batch.index_R, mine) if t.reports and t.dp_rank == 0 else None, t)
        return context.merge([part for part in parts if part is not None])

    def _score(self, chunk: torch.nn.Module, batch: Microbatch, temperature: float):
        """A chunk's output: of the last one (logprob_R, entropy_R)."""
        batch = _to(batch, self.topology.device)
        hidden = model.hidden_states(chunk, batch, self.topology)
        if not model.unwrapped(chunk).post_process:
            return hidden
        if self.linear_grpo is None:
            return self._logprobs(hidden, batch, temperature)
        return self._loss(hidden, batch, temperature, None)[1:]

    def _logprobs(self, hidden_RD: torch.Tensor, batch: Microbatch, temperature: float):
        """(logprob_R, entropy_R) with gradients."""
        weight_VD = model.unwrapped(self.modules[-1]).head_weight
        return logprobs_and_entropy(
            hidden_RD,
            weight_VD,
            batch.target_R,
            temperature=temperature,
            vocab_size=self.hf_config.vocab_size,
            tp_group=self.topology.head_group,
            impl=self.kernels.linear_logprob,
            workspace_bytes=self.kernels.workspace_bytes,
            main_grad_VD=self._main_grad(weight_VD),
        )

    def _loss(self, hidden_RD: torch.Tensor, batch: Microbatch, temperature: float, loss: LossFunction | None):
        """(the loss with gradients or None, logprob_R and entropy_R without)"""

        def of_part(logprob: torch.Tensor, entropy: torch.Tensor, rows: slice) -> torch.Tensor:
            assert loss is not None
            return loss(logprob, entropy, of_rows(batch, rows))[0]

        assert self.linear_grpo is not None
        weight_VD = model.unwrapped(self.modules[-1]).head_weight
        return loss_and_logprobs(
            self.linear_grpo,
            hidden_RD,
            weight_VD,
            batch.target_R,
            None if loss is None else of_part,
            temperature=temperature,
            vocab_size=self.hf_config.vocab_size,
            tp_group=self.topology.head_group,
            main_grad_VD=self._main_grad(weight_VD),
        )

    def _main_grad(self, weight: torch.Tensor) -> torch.Tensor | None:
        """DDP's buffer of the weight's gradient, where the head may add to it: overlap_grad_reduce asks for a
        param.grad."""
        return None if self.topology.parallel.overlap_grad_reduce else getattr(weight, "main_grad", None)

    def export(self, **how) -> Iterator[tuple[str, torch.Tensor]]:
        """(HF name, tensor) of the weights as they are now, by default on the driver; collective. `how` is
        hf_weights.export's."""
        return hf_weights.export(self.chunks, self.hf_config, self.topology, **how)


class Policy(FrozenPolicy):
    """Learns. The optimizer's state is sharded over data ranks."""

    def __init__(
        self,
        folder: str,
        topology: Topology,
        *,
        precision: config.Precision,
        temperature: float,
        optimizer: config.Optimizer,
        kernels: config.Kernels = config.Kernels(),
        pointwise: bool | None = None,
        load_weights: bool = True,
    ):
        super().__init__(
            folder,
            topology,
            precision=precision,
            temperature=temperature,
            kernels=kernels,
            pointwise=pointwise,
            load_weights=load_weights,
        )
        axes = topology.parallel
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=True,
            overlap_grad_reduce=axes.overlap_grad_reduce,
            overlap_param_gather=axes.overlap_param_gather,
        )
        # The chunks behind the first reduce their gradients while others compute: they need no buckets.
        self.modules = [
            DistributedDataParallel(chunk.config, ddp, chunk.requires_grad_(True), disable_bucketing=index > 0)
            for index, chunk in enumerate(self.chunks)
        ]
        if axes.overlap_grad_reduce:
            pipeline.overlap_grad_reduce(self.chunks[0].config, self.modules)
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=optimizer.lr,
                adam_beta1=optimizer.beta1,
                adam_beta2=optimizer.beta2,
                adam_eps=optimizer.eps,
                weight_decay=optimizer.weight_decay,
                clip_grad=optimizer.clip_grad,
                bf16=precision.params == "bfloat16",
                params_dtype=getattr(torch, precision.params),
                use_distributed_optimizer=True,
                overlap_param_gather=axes.overlap_param_gather,
            ),
            self.modules,
            # Without any, what Megatron would not decay stands in a group of its own.
            config_overrides={} if optimizer.decay == "all" else None,
        )
        for group in self.optimizer.param_groups:  # Megatron's scheduler would do it, which is not used
            group["weight_decay"] *= group["wd_mult"]

    def update(self, batch: GlobalBatch, loss: LossFunction, *, lr: float) -> dict[str, metrics.Metric]:
        """One optimizer step. Collective. Returns this rank's metrics: those of the ranks that report, merged, are the
        whole.

        `loss` must be pointwise if the policy has been told that it is. Raises FloatingPointError on all ranks if the
        gradient is not finite; the weights are unchanged then.
        """
        for module in self.modules:
            module.zero_grad_buffer()
        self.optimizer.zero_grad()

        def forward(chunk: torch.nn.Module, m: Microbatch):
            m = _to(m, self.topology.device)
            hidden = model.hidden_states(chunk, m, self.topology)
            return (hidden, m) if model.unwrapped(chunk).post_process else hidden

        def after(output, _):
            hidden_RD, m = output
            if self.linear_grpo is None:
                logprobs_R, entropy_R = self._logprobs(hidden_RD, m, self.temperature)
                value, stats = loss(logprobs_R, entropy_R, m)
            else:
                value, logprobs_R, entropy_R = self._loss(hidden_RD, m, self.temperature, loss)
                with torch.no_grad():
                    _, stats = loss(logprobs_R, entropy_R, m)
            # Read after the last microbatch: to read a number waits for the GPU.
            return value, {**stats, "entropy": entropy_R.detach(), "loss": value.detach().clone()}

        parts = pipeline.run(self.modules, batch.microbatches, forward, after)
        self._check_gradient()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        _, grad_norm, _ = self.optimizer.step()
        if not self.topology.is_last_stage:
            return {}
        means = metrics.merge([{f"update/{name}": metrics.Mean.of(x) for name, x in part.items()} for part in parts])
        # A sum over microbatches and the ranks that share the tokens, and a mean over optimizer steps.
        means["update/loss"] = metrics.Mean(means["update/loss"].total, 1 / (self.topology.dp * self.topology.cp))
        means["update/grad_norm"] = metrics.Mean(float(grad_norm or 0.0), int(grad_norm is not None))
        return {**means}

    def export(self, **how) -> Iterator[tuple[str, torch.Tensor]]:
        self.finish_param_gather()
        return super().export(**how)

    def finish_param_gather(self) -> None:
        """Makes the updated weights whole now; with overlap_param_gather they else become so in the next forward
        pass."""
        if self.topology.parallel.overlap_param_gather:
            for module in self.modules:
                module.start_param_sync(force_sync=True)

    def offload(self, parts: Sequence[str]) -> None:
        """Gives back the GPU memory of `gradients` and of the `optimizer`, whose state goes to the host's; `onload`
        undoes it."""
        if "gradients" in parts:
            for module in self.modules:
                module.offload_grad_buffers()
        if "optimizer" in parts:
            self.optimizer.offload_to_cpu()

    def onload(self, parts: Sequence[str]) -> None:
        if "gradients" in parts:
            for module in self.modules:
                module.restore_grad_buffers()
        if "optimizer" in parts:
            self.optimizer.restore_from_cpu()

    def _check_gradient(self) -> None:
        # NaN is an end.
        ends = [x for module in self.modules for buffer in module.buffers for x in torch.aminmax(buffer.grad_data)]
        if not collectives.on_any_rank(not torch.stack(ends).isfinite().all().item(), self.topology):
            return
        bad = [
            name for chunk in self.chunks for name, p in chunk.named_parameters() if not p.main_grad.isfinite().all()
        ]
        names = [name for part in collectives.gather(bad, self.topology) for name in part]
        raise FloatingPointError(
            f"update: the gradient of {names[0]} (and {len(names) - 1} more) is not finite; the last checkpoint is good"
        )


def _to(batch: Microbatch, device: torch.device) -> Microbatch:
    if device.type == "cpu":
        return batch
    moved: dict[str, Any] = {
        f.name: v.to(device, non_blocking=True)
        for f in dataclasses.fields(batch)
        if isinstance(v := getattr(batch, f.name), torch.Tensor)
    }
    return dataclasses.replace(batch, **moved)


def learning_rate(cfg: config.Optimizer, step: int, num_steps: int) -> float:
    """Of the step after `step` completed ones: linear warm-up, then constant or linear to 0 at num_steps."""
    lr = cfg.lr * (1 - step / num_steps) if cfg.lr_schedule == "linear" else cfg.lr
    if step < cfg.warmup_steps:
        lr *= cfg.warmup_start_frac + (1 - cfg.warmup_start_frac) * step / cfg.warmup_steps
    return lr
