"""Hugging Face folders <-> Megatron checkpoints, tensor by tensor, without a model: any layout reads what is written
here, and what any layout wrote is read here.

In a checkpoint the shards of all ranks make one tensor (checkpoint's keys are Transformer Engine's names, on a CPU
too): layers are stacked along a first axis, gate stands above up, and the vocabulary may be padded at its end.
"""

import ast
import contextlib
import json
import pickle
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from grpo_mcore.checkpoint.checkpoint import ATTEST, HF, Progress, Writing
from grpo_mcore.checkpoint.stored import Stored, digest
from grpo_mcore.config.config import InputError
from grpo_mcore.parallel.topology import Topology
from grpo_mcore.policy import hf_weights, model
from grpo_mcore.policy.hf_weights import Row, gate_up

Part = tuple[tuple[int, ...], tuple[int, ...], str]  # offset and shape within one layer's parameter, and its digest


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
    Raises InputError, also if they are not those that were saved."""
    side = Path(folder) / HF
    if not side.is_dir():
        raise InputError(
            "checkpoint", str(folder), f"has no {HF}/ folder", "name a folder like RUN/checkpoints/step_000010"
        )
    hf_config = model.load_hf_config(str(side))
    parts = attested(folder)
    with _reading(folder):
        stored = Stored(folder)
    rows = hf_weights.table(hf_config, transformer_engine=True)

    def tensors():
        for row in rows:
            key, layer = key_of(row)
            whole = _merged_shape(row)
            with _reading(folder):
                part = stored.read(key, (*layer, *[0] * len(whole)), (*[1] * len(layer), *whole)).view(whole)
            if not (of_row := parts.get((key, layer))):
                raise _damaged(folder, f"{ATTEST} lacks {row.megatron}")
            if (place := differing(part, of_row)) is not None:
                raise _damaged(folder, f"{row.megatron} at {place} is not what was saved")
            yield from zip(row.hf, _split(row, part, hf_config), strict=True)

    with _reading(folder):
        dtype = stored.dtype(key_of(rows[0])[0])
    hf_weights.save_folder(hf_folder, tensors(), side, shapes=hf_weights.shapes(hf_config), dtype=dtype)


def attested(folder: str | Path) -> dict[tuple[str, tuple[int, ...]], list[Part]]:
    """(key, layer) -> the parts of a checkpoint's weights as ranks held them when it was saved. Raises InputError."""
    path, parts = Path(folder) / ATTEST, defaultdict(list)
    if not path.is_file():
        raise InputError(
            "--checkpoint", str(folder), f"has no {ATTEST}", "name a folder like RUN/checkpoints/step_000010"
        )
    try:
        for name, value in json.loads(path.read_text())["weights"].items():  # key offset shape
            key, _, part = name.partition(" ")
            offset, shape = ast.literal_eval(part.replace(") (", "), ("))
            stacked = int(key.startswith("decoder.layers."))
            parts[key, offset[:stacked]].append((offset[stacked:], shape[stacked:], value))
    except (ValueError, KeyError, TypeError, AttributeError, SyntaxError) as e:
        raise _damaged(folder, f"{ATTEST}: {e!r}") from None
    return dict(parts)


def differing(whole: torch.Tensor, parts: Iterable[Part]) -> tuple[int, ...] | None:
    """Where a part of one layer's parameter is that has not its digest."""
    return next((offset for offset, shape, value in parts if digest(_cut(whole, offset, shape)) != value), None)


def _cut(whole: torch.Tensor, offset: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
    """The part of that shape at `offset`; rows beyond the end, which pad a vocabulary, are zero."""
    part = whole[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
    missing = shape[0] - len(part)
    return torch.cat([part, part.new_zeros(missing, *part.shape[1:])]) if missing else part


@contextlib.contextmanager
def _reading(folder: str | Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, RuntimeError, KeyError, pickle.UnpicklingError) as e:
        raise _damaged(folder, f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}") from None


def _damaged(folder: str | Path, what: str) -> InputError:
    return InputError("--checkpoint", str(folder), f"is damaged ({what})", "name another step's, or copy it again")


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
