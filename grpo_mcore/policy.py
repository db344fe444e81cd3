"""The policy: Megatron's model, DDP and optimizer, and the two things a step asks of them: log-probs and an update."""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from grpo_mcore import config, hf_weights, metrics, model
from grpo_mcore.logprob import logprobs_and_entropy
from grpo_mcore.parallel import pipeline
from grpo_mcore.parallel.topology import Topology
from grpo_mcore.types import GlobalBatch, Microbatch

# (current_logprobs_R, microbatch) -> (loss, statistics [R] by name)
LossFunction = Callable[[torch.Tensor, Microbatch], tuple[torch.Tensor, dict[str, torch.Tensor]]]


class FrozenPolicy:
    """Scores, never learns: the reference of the KL term."""

    def __init__(self, folder: str, topology: Topology, *, params_dtype: str, temperature: float):
        """`folder` is a Hugging Face folder; log-probs are taken of logits / temperature."""
        self.folder, self.topology, self.temperature = folder, topology, temperature
        self.hf_config = model.load_hf_config(folder)
        self.backbone = model.build(self.hf_config, tp=topology.tp, params_dtype=getattr(torch, params_dtype), device=topology.device)
        hf_weights.load(self.backbone, self.hf_config, folder, topology)
        self.backbone.requires_grad_(False)
        self.module: torch.nn.Module = self.backbone  # what the schedule calls

    @torch.no_grad()
    def logprobs(self, microbatches: Sequence[Microbatch], *, temperature: float | None = None) -> list[torch.Tensor]:
        """float32 [R] per microbatch, on the CPU. `temperature` None: the policy's own."""
        outputs = pipeline.run(self.module, list(microbatches), lambda stage, m: self._score(stage, m, temperature or self.temperature))
        return [logprobs.cpu() for logprobs, _ in outputs]

    def _score(self, stage: torch.nn.Module, batch: Microbatch, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        batch = _to(batch, self.topology.device)
        return logprobs_and_entropy(
            model.hidden_states(stage, batch), self.backbone.head_weight, batch.target_R, temperature=temperature,
            vocab_size=self.hf_config.vocab_size, tp_group=self.topology.tp_group if self.topology.tp > 1 else None)

    def export(self):
        """(HF name, tensor) of the weights as they are now; collective over the tp ranks."""
        return hf_weights.export(self.backbone, self.hf_config, self.topology)


class Policy(FrozenPolicy):
    """Learns. Weights of biases and norms are not decayed (Megatron's rule)."""

    def __init__(self, folder: str, topology: Topology, *, params_dtype: str, temperature: float, optimizer: config.Optimizer):
        super().__init__(folder, topology, params_dtype=params_dtype, temperature=temperature)
        self.backbone.requires_grad_(True)
        self.module = DistributedDataParallel(
            self.backbone.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=False), self.backbone)
        bf16 = params_dtype == "bfloat16"
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam", lr=optimizer.lr, adam_beta1=optimizer.beta1, adam_beta2=optimizer.beta2, adam_eps=optimizer.eps,
                weight_decay=optimizer.weight_decay, clip_grad=optimizer.clip_grad, bf16=bf16, params_dtype=getattr(torch, params_dtype),
                use_distributed_optimizer=False),
            [self.module])

    def update(self, batch: GlobalBatch, loss: LossFunction, *, lr: float) -> dict[str, metrics.Metric]:
        """One optimizer step. Returns this rank's metrics: merge those of the data ranks for the whole.

        Raises FloatingPointError if the gradient is not finite; the weights are unchanged then.
        """
        self.module.zero_grad_buffer()
        self.optimizer.zero_grad()

        def after(output, m: Microbatch):
            logprobs_R, entropy_R = output
            value, stats = loss(logprobs_R, _to(m, self.topology.device))
            parts = {f"update/{name}": metrics.Mean.of(stat) for name, stat in stats.items()}
            parts["update/entropy"] = metrics.Mean.of(entropy_R.detach())
            parts["update/loss"] = metrics.Sum(value.item())
            return value, parts

        parts = pipeline.run(self.module, batch.microbatches, lambda stage, m: self._score(stage, m, self.temperature), after)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._check_gradient()
        _, grad_norm, _ = self.optimizer.step()
        out = metrics.merge(parts)
        # A sum over microbatches and data ranks, and a mean over optimizer steps.
        out["update/loss"] = metrics.Mean(out["update/loss"].value, 1 / self.topology.dp)
        out["update/grad_norm"] = metrics.Mean(float(grad_norm), 1) if grad_norm is not None else metrics.Mean(0.0, 0)
        return out

    def gradients(self) -> dict[str, torch.Tensor]:
        """This rank's reduced gradient by Megatron name, as the last `update` left it (clipped in place by its step)."""
        return {name: p.main_grad for name, p in self.backbone.named_parameters()}

    def _check_gradient(self) -> None:
        bad = [name for name, grad in self.gradients().items() if not grad.isfinite().all()]
        if bad:
            raise FloatingPointError(f"update: the gradient of {bad[0]} (and {len(bad) - 1} more) is not finite; the last checkpoint is good")


def _to(batch: Microbatch, device: torch.device) -> Microbatch:
    if device.type == "cpu":
        return batch
    moved = {f.name: v.to(device, non_blocking=True) for f in dataclasses.fields(batch) if isinstance(v := getattr(batch, f.name), torch.Tensor)}
    return dataclasses.replace(batch, **moved)


def learning_rate(cfg: config.Optimizer, step: int, num_steps: int) -> float:
    """Of the step after `step` completed ones: linear warm-up, then constant or linear to 0 at num_steps."""
    lr = cfg.lr * (1 - step / num_steps) if cfg.lr_schedule == "linear" else cfg.lr
    if step < cfg.warmup_steps:
        lr *= cfg.warmup_start_frac + (1 - cfg.warmup_start_frac) * step / cfg.warmup_steps
    return lr
