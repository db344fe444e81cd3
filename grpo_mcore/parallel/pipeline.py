"""The ONE place where loss scaling meets Megatron's schedule and DDP.

The chain, for a loss that is a sum over tokens of weight * value, its weights already divided by the global
denominator (batch.py):

    ours        loss of a microbatch = sum over its tokens                     no further factor
    schedule    calculate_per_token_loss and a 3-tuple from the loss function  divides by nothing
    DDP         calculate_per_token_loss                                       sums over data ranks, not averages
    finalize    num_tokens is withheld                                         divides by nothing

so the gradient is the plain sum over microbatches and data ranks, whatever their number. With Megatron's default, a
mean over microbatches and data ranks, the gradient would depend on how tokens fall into microbatches.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

Item = TypeVar("Item")


def configure(transformer_config) -> None:
    """Sets the fields of Megatron's config that the chain above rests on; call before DDP is built."""
    from megatron.core.distributed import finalize_model_grads

    def finalize(models, num_tokens=None, **kwargs):
        finalize_model_grads(models, None, **kwargs)

    transformer_config.calculate_per_token_loss = True
    transformer_config.finalize_model_grads_func = finalize


def overlap_grad_reduce(transformer_config, chunks: Sequence[torch.nn.Module]) -> None:
    """Has DDP reduce each bucket of gradients as the last microbatch completes it."""
    no_sync = [chunk.no_sync for chunk in chunks]
    transformer_config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]


def run(
    chunks: Sequence[torch.nn.Module],
    items: list[Item],
    forward: Callable[[torch.nn.Module, Item], torch.Tensor],
    loss: Callable[[torch.Tensor, Item], tuple[torch.Tensor, object]] | None = None,
) -> list:
    """One pass of Megatron's schedule over `items` (one microbatch each), in order. Collective over the pipeline's
    stages.

    `chunks` are this rank's part of the model; `forward(chunk, item)` gives a chunk's output. With `loss`,
    `loss(output, item)` of the last chunk gives (scalar to be summed, anything to be returned), and gradients are left
    reduced in the model's buffers; without it there is no backward and the last chunk's outputs are returned. Other
    stages get Nones.
    """
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def forward_step(iterator: Iterator[Item], chunk: torch.nn.Module):
        item = next(iterator)

        def after(output: torch.Tensor, non_loss_data: bool = False):
            if non_loss_data or loss is None:
                return output
            value, extra = loss(output, item)
            return value, torch.zeros((), dtype=torch.int, device=value.device), extra

        return forward(chunk, item), after

    # The interleaved schedule takes whole rounds of its stages. A scoring pass may go round for nothing; batch.py packs
    # updates so.
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    idle = -len(items) % stages if len(chunks) > 1 and loss is None else 0
    padded = items + items[-1:] * idle
    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(padded) for _ in chunks] if len(chunks) > 1 else iter(padded),
        model=list(chunks),
        num_microbatches=len(padded),
        seq_length=1,  # stages tell each other the size of what they send
        micro_batch_size=1,
        forward_only=loss is None,
        collect_non_loss_data=loss is None,
    )
    return outputs[: len(items)] if outputs else [None] * len(items)
