"""Transformer Engine's layers as the weight table, the checkpoints and the FP8 section know them: built on a CPU, where
their parameters can be made, loaded and exported, and nothing else of them runs.

Skipped where Transformer Engine is not installed, unless GRPO_MCORE_NEEDS_TE is set, as by `make test-gpu-stack` where
it has a wheel. Not covered here: what the layers compute (marked gpu).
"""

import dataclasses
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch

from grpo_mcore.config import config
from grpo_mcore.config.config import Parallel, Precision
from grpo_mcore.parallel import topology
from grpo_mcore.policy import hf_weights, model
from tests.dist import spawn
from tests.policy.test_hf_weights import chunks_of
from tests.policy.test_model import DISTILL

if os.environ.get("GRPO_MCORE_NEEDS_TE"):
    importlib.import_module("transformer_engine.pytorch")
else:
    pytest.importorskip("transformer_engine.pytorch", exc_type=ImportError)

KINDS = ("qwen2_untied", "qwen3", "llama_llama3_rope")


@contextmanager
def layers_on_a_cpu() -> Iterator[None]:
    """`model.build` for a topology of CUDA makes Transformer Engine's layers, with parameters on the CPU."""
    translate = model.transformer_config

    def on_cpu(*args, **kwargs):
        translated = translate(*args, **kwargs)
        translated.use_cpu_initialization = True
        return translated

    with (
        mock.patch.object(torch.cuda, "is_available", lambda: True),  # else its modules refuse to be made
        mock.patch.object(model, "transformer_config", on_cpu),
        mock.patch.object(model.Backbone, "to", lambda self, device: self),
    ):
        yield


def layers_of(folder: str, topo) -> tuple[list[model.Backbone], model.HFConfig]:
    """(the chunks with Transformer Engine's layers and the folder's weights in bfloat16, its config)"""
    hf_config = model.load_hf_config(folder)
    with layers_on_a_cpu():
        on_cuda = dataclasses.replace(topo, device=torch.device("cuda"))
        chunks = model.build(hf_config, topology=on_cuda, precision=Precision())
    hf_weights.load(chunks, hf_config, folder, topo)
    return chunks, hf_config


def split_axis(row: hf_weights.Row) -> int | None:
    """The axis that the table splits over tp."""
    return {hf_weights.same: None, hf_weights.columns: 1}.get(row.layout, 0)


def sharded(chunks) -> dict[str, tuple]:
    """What a checkpoint would hold of the chunks: (whole shape, this rank's offset) by key."""
    from grpo_mcore.checkpoint.checkpoint import _sharded_tensors

    states = [chunk.sharded_state_dict() for chunk in chunks]
    return {(t.key, tuple(t.global_offset)): tuple(t.global_shape) for s in states for t in _sharded_tensors(s)}


def compare(folders: dict[str, str], axes: dict) -> None:
    topo = topology.connect(Parallel(**axes), device=torch.device("cpu"), timeout_s=60, seed=1)
    for kind, folder in folders.items():
        chunks, hf_config = layers_of(folder, topo)
        plain, _ = chunks_of(folder, topo, Precision())
        with hf_weights.Reader(folder) as reader:
            for name, tensor in hf_weights.export(chunks, hf_config, topo):
                assert torch.equal(tensor, reader.read(name, tensor.shape).bfloat16()), (kind, name)
        assert sharded(chunks) == sharded(plain), kind  # a checkpoint of a CPU is one of a GPU, and back
        parameters = {chunk.global_name(name): p for chunk in chunks for name, p in chunk.named_parameters()}
        for row in hf_weights.table(hf_config, topo.parallel, transformer_engine=True):
            if (p := parameters.get(row.megatron)) is not None and topo.tp > 1:
                axis = p.partition_dim if getattr(p, "tensor_model_parallel", False) else None
                assert axis == split_axis(row), (kind, row.megatron)  # else the gradient norm misses its shards
                if row.layout is hf_weights.same and topo.parallel.sequence_parallel:
                    assert p.sequence_parallel, (kind, row.megatron)  # by this mark its gradient is summed over tp
    topology.disconnect()


@pytest.mark.parametrize(
    ("ranks", "axes"),
    [(1, {}), (4, {"tp": 2, "pp": 2, "sequence_parallel": True})],
    ids=["1 rank", "tp 2, pp 2, sequence parallel"],
)
def test_the_weight_table_and_checkpoints_fit_the_layers(model_folders, ranks, axes):
    spawn(compare, ranks, {kind: model_folders[kind] for kind in KINDS}, axes)


@pytest.mark.parametrize(
    ("precision", "name", "expected"),
    [
        (
            Precision(fp8="delayed", fp8_format="hybrid", fp8_amax_history=16),
            "DelayedScaling",
            {"amax_history_len": 16, "amax_compute_algo": "max", "margin": 0},
        ),
        (Precision(fp8="tensorwise", fp8_format="hybrid"), "Float8CurrentScaling", {"fp8_dpa": False}),
        (Precision(fp8="blockwise", fp8_format="e4m3"), "Float8BlockScaling", {}),
    ],
    ids=lambda value: value.fp8 if isinstance(value, config.Precision) else "",
)
def test_an_fp8_section_is_transformer_engines_recipe(precision, name, expected):
    from megatron.core.fp8_utils import get_fp8_recipe
    from transformer_engine.common import recipe

    made = get_fp8_recipe(model.transformer_config(DISTILL, precision=precision, cuda=False))
    assert isinstance(made, getattr(recipe, name))
    assert made.fp8_format == getattr(recipe.Format, precision.fp8_format.upper())
    assert {key: getattr(made, key) for key in expected} == expected
