"""Hugging Face folders <-> Megatron checkpoints, tensor by tensor, without a model: any layout reads what is written
here, and what any layout wrote is read here.

In a checkpoint the shards of all ranks make one tensor (checkpoint's keys are Transformer Engine's names, on a CPU
too): layers are stacked along a first axis, gate stands above up, and the vocabulary may be padded at its end.
"""

from pathlib import Path

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from grpo_mcore.checkpoint.checkpoint import HF, Progress, Writing
from grpo_mcore.checkpoint.stored import Stored
from grpo_mcore.config.config import InputError
from grpo_mcore.parallel.topology import Topology
from grpo_mcore.policy import hf_weights, model
from grpo_mcore.policy.hf_weights import Row, gate_up


def from_hf(hf_folder: str | Path, folder: str | Path, topology: Topology, *, timeout_s: float = 3600) -> None:
    """A Hugging Face folder as a checkpoint at step 0, without optimizer. On one rank; holds the model once. Raises
    InputError."""
    hf_config = model.load_hf_config(str(hf_folder))
    hf_weights.check(hf_folder, hf_config)
    rows = hf_weights.table(hf_config, transformer_engine=True)
    with hf_weights.Reader(hf_folder) as reader:
        reader.dtype()
        state = {
            "model0": {
                row.megatron: _to_store(row, [reader.read(name, shape) for name, shape in row.hf.items()], hf_config)
                for row in rows
            }
        }
        writing = Writing(Path(folder), state, state, Progress(), topology, hf_folder=hf_folder)
        writing.wait(timeout_s)
        writing.publish()


def to_hf(folder: str | Path, hf_folder: str | Path) -> None:
    """The weights of a checkpoint as a Hugging Face folder, in the checkpoint's dtype; holds one tensor at a time.
    Raises InputError."""
    side = Path(folder) / HF
    if not side.is_dir():
        raise InputError(
            "checkpoint", str(folder), f"has no {HF}/ folder", "name a folder like RUN/checkpoints/step_000010"
        )
    hf_config = model.load_hf_config(str(side))
    stored = Stored(folder)
    rows = hf_weights.table(hf_config, transformer_engine=True)

    def tensors():
        for row in rows:
            key, layer = key_of(row)
            whole = _merged_shape(row)
            part = stored.read(key, (*layer, *[0] * len(whole)), (*[1] * len(layer), *whole))
            yield from zip(row.hf, _split(row, part.view(whole), hf_config), strict=True)

    dtype = stored.dtype(key_of(rows[0])[0])
    hf_weights.save_folder(hf_folder, tensors(), side, shapes=hf_weights.shapes(hf_config), dtype=dtype)


def key_of(row: Row) -> tuple[str, tuple[int, ...]]:
    """(key in the checkpoint, its place on the axis of layers: () or (layer,))"""
    prefix = "decoder.layers."
    if not row.megatron.startswith(prefix):
        return row.megatron, ()
    layer, _, rest = row.megatron.removeprefix(prefix).partition(".")
    return prefix + rest, (int(layer),)


def _merged_shape(row: Row) -> tuple[int, ...]:
    """Of the Megatron parameter on one rank, without padding."""
    shapes = list(row.hf.values())
    if len(shapes) == 1:
        return shapes[0]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _to_store(row: Row, tensors: list[torch.Tensor], hf_config) -> ShardedTensor | list[ShardedTensor]:
    key, layer = key_of(row)
    layers = [(0, layer[0], hf_config.num_hidden_layers)] if layer else []

    def place(tensor: torch.Tensor, *offsets) -> ShardedTensor:
        return ShardedTensor.from_rank_offsets(key, tensor, *layers, *offsets, prepend_axis_num=len(layers))

    if row.layout is gate_up:  # put side by side where they are stored, not here
        return [place(tensor, (len(layers), half, 2)) for half, tensor in enumerate(tensors)]
    return place(merged(row, tensors, hf_config))


def merged(row: Row, tensors: list[torch.Tensor], hf_config) -> torch.Tensor:
    """The Megatron parameter of Hugging Face's tensors, without padding."""
    if len(tensors) == 1:
        return tensors[0]
    whole = torch.empty(_merged_shape(row), dtype=tensors[0].dtype)
    for hf, part in row.layout(tensors, whole, hf_config, 1, 0):
        part.copy_(hf)
    return whole


def _split(row: Row, whole: torch.Tensor, hf_config) -> list[torch.Tensor]:
    """Undoes merged."""
    if len(row.hf) == 1:
        return [whole]
    tensors = [whole.new_empty(shape) for shape in row.hf.values()]
    for hf, part in row.layout(tensors, whole, hf_config, 1, 0):
        hf.copy_(part)
    return tensors
