"""The ONE place where loss scaling meets Megatron's schedule and DDP.

The chain, for a loss that is a sum over tokens of weight * value, its weights already divided by the global
denominator (batch.py):

    ours        loss of a microbatch = sum over its tokens                     no further factor
    schedule    calculate_per_token_loss and a 3-tuple from the loss function  divides by nothing
    DDP         calculate_per_token_loss                                       sums over data ranks, not averages
    finalize    num_tokens is withheld                                         divides by nothing

so the gradient is the plain sum over microbatches and data ranks, whatever their number. With Megatron's default, a mean
over microbatches and data ranks, the gradient would depend on how tokens fall into microbatches.
"""

from collections.abc import Callable, Iterator

import torch


def configure(transformer_config) -> None:
    """Sets the fields of Megatron's config that the chain above rests on; call before DDP is built."""
    from megatron.core.distributed import finalize_model_grads

    def finalize(models, num_tokens=None, **kwargs):
        finalize_model_grads(models, None, **kwargs)

    transformer_config.calculate_per_token_loss = True
    transformer_config.finalize_model_grads_func = finalize


def run(
    model: torch.nn.Module,
    items: list,
    forward: Callable[[torch.nn.Module, object], torch.Tensor],
    loss: Callable[[torch.Tensor, object], tuple[torch.Tensor, object]] | None = None,
) -> list:
    """One pass of Megatron's schedule over `items` (one microbatch each), in order.

    `forward(model, item)` gives the model's output. With `loss`, `loss(output, item)` gives (scalar to be summed, anything to
    be returned), and gradients are left reduced in the model's buffers; without it there is no backward and
    the outputs are returned.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def forward_step(iterator: Iterator, stage: torch.nn.Module):
        item = next(iterator)

        def after(output: torch.Tensor, non_loss_data: bool = False):
            if non_loss_data:
                return output
            value, extra = loss(output, item)
            return value, torch.zeros((), dtype=torch.int, device=value.device), extra

        return forward(stage, item), after

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(items),
        model=[model],
        num_microbatches=len(items),
        seq_length=1,  # only pipeline stages would use the two sizes, to shape what they send
        micro_batch_size=1,
        forward_only=loss is None,
        collect_non_loss_data=loss is None,
    )
