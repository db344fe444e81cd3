"""The tensors of a written checkpoint, read by key and place, one part at a time, whatever layout wrote them."""

import hashlib
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list


class Stored:
    """Megatron stacks the layers of a parameter: `decoder.layers.mlp.linear_fc2.weight` of layer 3 is the part at (3,
    0, 0)."""

    def __init__(self, folder: str | Path):
        self._reader = FileSystemReader(str(folder))
        self._metadata = self._reader.read_metadata()

    def dtype(self, key: str) -> torch.dtype:
        return self._tensor(key).properties.dtype

    def read(self, key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        """The part of that shape that begins at `offset` of the whole tensor. Raises KeyError for a key that is not
        there."""
        out = torch.empty(shape, dtype=self.dtype(key))
        planner = _OnePart(key, self._tensor(key), offset)
        planner.set_up_planner({key: out}, self._metadata, is_coordinator=True)
        self._reader.set_up_storage_reader(self._metadata, True)
        plan = self._reader.prepare_local_plan(planner.create_local_plan())
        self._reader.read_data(plan, planner).wait()
        return out

    def _tensor(self, key: str) -> TensorStorageMetadata:
        stored = self._metadata.state_dict_metadata[key]
        if not isinstance(stored, TensorStorageMetadata):
            raise KeyError(f"{key} is stored, but is no tensor")
        return stored


class _OnePart(DefaultLoadPlanner):
    """Plans the reading of a part of one tensor, where torch's own planner reads whole tensors or a mesh's shards."""

    def __init__(self, key: str, whole: TensorStorageMetadata, offset: tuple[int, ...]):
        super().__init__(flatten_state_dict=False)
        self._key, self._whole, self._offset = key, whole, torch.Size(offset)

    def create_local_plan(self) -> LoadPlan:
        part = ChunkStorageMetadata(self._offset, self.state_dict[self._key].size())
        return LoadPlan(create_read_items_for_chunk_list(self._key, self._whole, [part]))

    def lookup_tensor(self, index) -> torch.Tensor:
        return self.state_dict[self._key]


def digest(tensor: torch.Tensor) -> str:
    """Of the tensor's bytes, wherever it is."""
    array = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.blake2b(array.data, digest_size=16).hexdigest()


def file_digest(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
