"""Hugging Face tensors straight into the tensors that a running vLLM model computes with.

vLLM's own reload first makes every layer anew (meta tensors, loaders that count, a copy to keep, one to load, one to
put back): needed where weights are quantised or laid out anew. Where they are not, a tensor has a fixed place in a live
parameter; and where a CPU engine keeps only a packed copy for its matrix product, that is made from what came, without
a plain one between.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.platforms import current_platform

from grpo_mcore.refit.weight_transfer import TensorInfo

LOADER = "weight_loader"  # vLLM's name for what a parameter is loaded with
ORDER: dict[object, int] = {"q": 0, "k": 1, "v": 2}  # of the parts of a fused parameter, beside those that are numbered


@dataclass(eq=False)
class _Target:
    """One parameter and what it is made of."""

    parameter: torch.nn.Parameter
    owners: list[torch.nn.Module]  # several if it is tied
    parts: dict[str, int] = field(default_factory=dict)  # HF name -> order, then first row
    num_rows: int = 0  # of all parts: what is below them pads a vocabulary
    arrived: dict[str, torch.Tensor] = field(default_factory=dict)  # of a packed one
    repacked: list[VocabParallelEmbedding] = field(default_factory=list)  # that keep a packed copy besides

    @property
    def packed(self) -> bool:
        """Whether the layer kept only its packed copy."""
        return self.parameter.numel() == 0


class Loads(Protocol):
    """What weights are loaded into: a model of vLLM's, or LiveWeights."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> object: ...


class LiveWeights:
    """Make it with `of`. An update is `begin`, `load_weights` as often as needed, `end`."""

    def __init__(self, targets: Sequence[_Target]):
        self._target_of = {name: target for target in targets for name in target.parts}
        self._missing: set[str] = set()
        self.lasting: set[str] = set()  # names of tensors that may be used where they lie, until they come again
        heads = [m for t in targets for m in t.owners if isinstance(m, ParallelLMHead)]
        for target in targets if current_platform.is_cpu() else ():
            # A CPU worker multiplies with a packed copy of the head, beside the matrix in which it looks tokens up. A
            # model that has no module for the head multiplies with its embedding.
            target.repacked = [
                m for m in target.owners if isinstance(m, VocabParallelEmbedding) and (not heads or m in heads)
            ]

    @classmethod
    def of(cls, model: torch.nn.Module, infos: Sequence[TensorInfo]) -> "LiveWeights | None":
        """None if a weight of the model is quantised, split over ranks or otherwise not simply what `infos` name."""
        targets = _find_targets(model, infos)
        if targets is None or not all(_fits(t, {i.name: i.shape for i in infos}) for t in targets):
            return None
        return cls(targets)

    def begin(self) -> None:
        """The first that touches the weights, which a sleeping engine does not have."""
        self._missing = set(self._target_of)
        for target in self._target_of.values():
            target.arrived.clear()
            if not target.packed:
                target.parameter.data[target.num_rows :].zero_()

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Keeps none of the tensors but the lasting ones. Raises KeyError for a name that was not announced, or comes
        twice."""
        touched = {}
        for name, tensor in weights:
            self._missing.remove(name)
            target = touched[id(self._target_of[name])] = self._target_of[name]
            if target.packed:
                target.arrived[name] = tensor
                if len(target.arrived) == len(target.parts):
                    _pack(target.owners[0], _joined([target.arrived[part] for part in target.parts]))
                    target.arrived.clear()
            else:
                if name in self.lasting and tensor.shape == target.parameter.shape:
                    target.parameter.data = tensor
                else:
                    row = target.parts[name]
                    target.parameter.data[row : row + tensor.shape[0]].copy_(tensor)
                if target.repacked and self._missing.isdisjoint(target.parts):
                    for module in target.repacked:
                        module.cpu_linear = None  # first gives the old copy's memory back
                        module.quant_method.process_weights_after_loading(module)
        for target in touched.values():  # what waits for its other parts outlives the buffer
            target.arrived = {name: tensor.clone() for name, tensor in target.arrived.items()}

    def end(self) -> None:
        """Raises RuntimeError naming what did not come."""
        if self._missing:
            raise RuntimeError(f"{min(self._missing)} and {len(self._missing) - 1} more weights did not come")


def _find_targets(model: torch.nn.Module, infos: Sequence[TensorInfo]) -> list[_Target] | None:
    """Where the model's own load_weights puts each tensor, found by letting it load tensors without content into
    loaders that only take notes."""
    targets: dict[int, _Target] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is None:
                continue
            if type(getattr(module, "quant_method", None)) not in (
                type(None),
                UnquantizedLinearMethod,
                UnquantizedEmbeddingMethod,
            ):
                return None
            targets.setdefault(id(parameter), _Target(parameter, [])).owners.append(module)
    sent = {i.name: torch.empty(i.shape, dtype=i.dtype, device="meta") for i in infos}
    name_of = {id(tensor): name for name, tensor in sent.items()}
    noted: set[str] = set()

    def note(parameter, tensor, *args, **kwargs):
        part = next(iter([*args, *kwargs.values()]), getattr(tensor, "shard_id", None))
        name = name_of.get(id(tensor))
        if name is not None and isinstance(order := ORDER.get(part, part or 0), int):
            targets[id(parameter)].parts[name] = order
            noted.add(name)

    loaders = {key: getattr(t.parameter, LOADER, None) for key, t in targets.items()}
    try:
        for target in targets.values():
            setattr(target.parameter, LOADER, note)
        model.load_weights(iter(sent.items()))  # type: ignore[operator]  # every model of vLLM's has it
    finally:
        for key, target in targets.items():
            if loaders[key] is None:
                delattr(target.parameter, LOADER)
            else:
                setattr(target.parameter, LOADER, loaders[key])
    return list(targets.values()) if noted == set(sent) else None


def _fits(target: _Target, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether the parts, one below the other, are the parameter; then notes their first rows."""
    module, num_rows = target.owners[0], 0
    for name in sorted(target.parts, key=target.parts.__getitem__):
        del target.parts[name]  # and in again: now they stand in order
        target.parts[name] = num_rows
        num_rows += shapes[name][0]
    columns = {shapes[name][1:] for name in target.parts}
    if isinstance(module, VocabParallelEmbedding):  # whose rows are padded, with zeros
        expected = (module.org_vocab_size, *target.parameter.shape[1:])
    elif target.packed:
        expected = (getattr(module, "output_size", -1), getattr(module, "input_size", -1))
    else:
        expected = tuple(target.parameter.shape)
    if len(columns) != 1 or (num_rows, *columns.pop()) != expected:
        return False
    target.num_rows = num_rows
    return True


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """The parts one below the other: without a copy where they lie so."""
    first, end = parts[0], parts[0].data_ptr()
    for part in parts:
        if (
            part.data_ptr() != end
            or not part.is_contiguous()
            or part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
        ):
            return torch.cat(parts)
        end += part.nbytes
    return first.as_strided((sum(p.shape[0] for p in parts), *first.shape[1:]), first.stride())


def _pack(module: LinearBase, weight: torch.Tensor) -> None:
    """The packed copy of a layer, anew."""
    module.cpu_linear = None  # first gives the old copy's memory back
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    module.quant_method.process_weights_after_loading(module)
    if module.weight.numel():
        raise RuntimeError(f"{type(module).__name__} kept the weight, which lies in the sender's memory")
