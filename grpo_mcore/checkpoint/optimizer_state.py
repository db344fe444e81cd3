"""The optimizer's state as sharded tensors in the shape of the parameters, which any layout can load.

A data rank holds one run of the flattened parameters. Of a matrix such a run is at most three boxes: the rest of a row,
whole rows, the beginning of a row. Every rank writes its own boxes and reads straight into them: nothing is gathered,
and no rank ever holds more than its share. Names and shapes are those of Megatron's own `fully_reshardable` format,
which gathers all on one rank; what one writes the other reads.
"""

import math
from collections.abc import Iterator

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from grpo_mcore.policy.policy import Policy


def sharded(policy: Policy, weights: dict[str, dict]) -> dict:
    """What a save of the optimizer holds; `weights` are the sharded ones of each model chunk."""
    own = {"param_state": _boxes(policy, weights), "param_state_sharding_type": "fully_reshardable"}
    return {**policy.optimizer.state_dict(), **own}


def to_fill(policy: Policy, weights: dict[str, dict]) -> dict:
    """What a load fills in place: the main weights and both moments, which are made if no update has made them."""
    policy.optimizer.load_state_dict(policy.optimizer.state_dict())
    return {"param_state": _boxes(policy, weights)}


def finish_loading(policy: Policy, loaded: dict) -> None:
    """Of the groups of parameters only the number of updates is taken over: all else is the configuration's."""
    step = loaded["optimizer"]["param_groups"][0]["step"]
    for group in policy.optimizer.param_groups:
        group["step"] = step


def _boxes(policy: Policy, weights: dict[str, dict]) -> list[ShardedTensor]:
    """Of the main weights and the moments that this rank holds."""
    placed = (x for chunk in weights.values() for x in chunk.values())
    place_of = {id(x.data): x for x in placed if isinstance(x, (ShardedTensor, ShardedTensorFactory))}
    boxes: list[ShardedTensor] = []
    for optimizer in policy.optimizer.chained_optimizers:
        for buffer in optimizer.gbuf_ranges:
            for bucket in (bucket for buckets in buffer.values() for bucket in buckets):
                for parameter, ranges in bucket["param_map"].items():
                    place, run = place_of[id(parameter)], ranges["param"]
                    for kind, flat in optimizer._get_main_param_and_optimizer_states(parameter).items():
                        boxes += _cut(f"optimizer.state.{kind}.{place.key}", flat.detach(), run.start, place)
    return boxes


def _cut(
    key: str, flat: torch.Tensor, start: int, place: ShardedTensor | ShardedTensorFactory
) -> Iterator[ShardedTensor]:
    """The boxes of `flat`, which stands from element `start` on in the flattened parameter of that place."""
    # Gate and up of one fc1 are saved apart, and stand one after the other.
    parts = [place] if isinstance(place, ShardedTensor) else place.build()
    end, first = start + len(flat), 0  # elements of the parameter: of the run, and of the parts before
    for part in parts:
        whole = (*[1] * part.prepend_axis_num, *part.local_shape)  # of the stacked layers one
        numel = math.prod(whole)
        begins, ends = max(start - first, 0), min(end - first, numel)
        for offset, shape in boxes_of(begins, ends, whole) if begins < ends else ():
            size = math.prod(shape)
            yield ShardedTensor(
                key,
                flat[:size].view(shape),
                flat.dtype,
                shape,
                part.global_shape,
                tuple(a + o for a, o in zip(part.global_offset, offset, strict=True)),
                axis_fragmentations=None,
                replica_id=(*part.replica_id[:2], 0),  # of data ranks none holds what another does
                allow_shape_mismatch=part.allow_shape_mismatch,
            )
            flat = flat[size:]
        first += numel


def boxes_of(start: int, end: int, shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offset, shape) of the boxes that together are the elements start to end of a flattened tensor of `shape`, in its
    order: at most 2 * len(shape) - 1."""
    if len(shape) == 1:
        yield (start,), (end - start,)
        return
    row = math.prod(shape[1:])
    first, head = divmod(start, row)
    last, tail = divmod(end, row)
    if first == last:
        yield from (((first, *o), (1, *s)) for o, s in boxes_of(head, tail, shape[1:]))
        return
    if head:
        yield from (((first, *o), (1, *s)) for o, s in boxes_of(head, row, shape[1:]))
        first += 1
    if first < last:
        yield (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])
    if tail:
        yield from (((last, *o), (1, *s)) for o, s in boxes_of(0, tail, shape[1:]))
