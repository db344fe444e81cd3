"""Every call of the project to Megatron, Transformer Engine, vLLM and Ray fits the signature of what is installed, the
calls that only a GPU reaches among them: a keyword that a release renames fails here, on a CPU.

The calls are read from the sources with `ast`. Not covered here: what a call does, arguments that are put together at
run time (`**name`, unless it is a dict of this function), and methods of objects that INSTANCES does not name.
"""

import ast
import importlib.util
import inspect
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from grpo_mcore.config import config, file
from grpo_mcore.parallel import topology
from grpo_mcore.rollout import engine
from tests.dist import ROOT
from tests.test_layers import sources

LIBRARIES = ("megatron", "transformer_engine", "vllm", "ray")
# What an expression of a module is an object of.
INSTANCES = {
    "grpo_mcore.checkpoint.checkpoint": {
        "self._queue": "megatron.core.dist_checkpointing.strategies.async_utils:AsyncCallsQueue"
    },
    "grpo_mcore.checkpoint.optimizer_state": {
        "policy.optimizer": "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"
    },
    "grpo_mcore.policy.policy": {
        "self.optimizer": "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer",
        "module": "megatron.core.distributed:DistributedDataParallel",
    },
    "grpo_mcore.refit.receiver": {"self._engine": "vllm.distributed.weight_transfer.base:WeightTransferEngine"},
    "grpo_mcore.rollout.engine": {"self._llm": "vllm.v1.engine.async_llm:AsyncLLM"},
}


class Call(NamedTuple):
    module: str
    name: str  # of what is called, MODULE:NAME
    node: ast.Call
    method: bool  # of an instance: its first parameter is self
    dicts: dict[str, list[str]]  # keys of the dicts of its function that have a name

    def __str__(self) -> str:
        return f"{self.module.removeprefix('grpo_mcore.')}:{self.node.lineno} {self.name}"


def _dicts(function: ast.AST) -> dict[str, list[str]]:
    found = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = [key.value for key in node.value.keys if isinstance(key, ast.Constant)]
    return found


def calls(module: str, source: str) -> Iterator[Call]:
    tree = ast.parse(source)
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LIBRARIES:
            names |= {alias.asname or alias.name: f"{node.module}:{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name: f"{alias.name}:" for alias in node.names if alias.name.split(".")[0] in LIBRARIES}
    seen = set()
    for function in ast.walk(tree):  # the outer ones first
        if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        for node in ast.walk(function):
            if not isinstance(node, ast.Call) or node in seen:
                continue
            seen.add(node)
            called = ast.unparse(node.func)
            owner, _, method = called.rpartition(".")
            first, _, rest = called.partition(".")
            if owner in INSTANCES.get(module, {}):
                yield Call(module, f"{INSTANCES[module][owner]}.{method}", node, True, _dicts(function))
            elif first in names and "(" not in called:
                yield Call(
                    module, f"{names[first]}.{rest}".strip(".").replace(":.", ":"), node, False, _dicts(function)
                )


def resolve(name: str):
    """The object of MODULE:NAME. Raises ImportError, AttributeError."""
    path, _, attributes = name.partition(":")
    found = importlib.import_module(path)
    for part in attributes.split("."):
        path = f"{path}.{part}"
        if inspect.ismodule(found) and not hasattr(found, part) and importlib.util.find_spec(path):
            importlib.import_module(path)
        found = getattr(found, part)
    return found


def misfit(call: Call) -> str | None:
    """Why the call does not fit."""
    try:
        signature = inspect.signature(resolve(call.name))
    except AttributeError as e:
        return str(e)
    positional = [None] * (len([a for a in call.node.args if not isinstance(a, ast.Starred)]) + call.method)
    keywords, whole = {}, not any(isinstance(a, ast.Starred) for a in call.node.args)
    for keyword in call.node.keywords:
        if keyword.arg:
            keywords[keyword.arg] = None
        elif isinstance(keyword.value, ast.Name) and keyword.value.id in call.dicts:
            keywords |= dict.fromkeys(call.dicts[keyword.value.id])
        else:
            whole = False
    try:
        (signature.bind if whole else signature.bind_partial)(*positional, **keywords)
    except TypeError as e:
        return f"{e}; its signature is {signature}"
    return None


SOURCES = {
    module: path.read_text() for folder in ("grpo_mcore", "benchmarks") for module, path in sources(folder).items()
}
CALLS = [call for module, source in SOURCES.items() for call in calls(module, source)]


def test_every_call_fits_what_is_installed():
    wrong = [
        f"{call}: {problem}"
        for call in CALLS
        if importlib.util.find_spec(_library(call)) and not _looked_for(call) and (problem := misfit(call))
    ]
    assert not wrong, "\n".join(wrong)
    assert set(map(_library, CALLS)) >= {"megatron", "vllm", "ray"}


def _library(call: Call) -> str:
    return call.name.partition(":")[0].partition(".")[0]


def _looked_for(call: Call) -> bool:
    """Whether the code asks, with the name as a string, if this release has it."""
    return f'"{re.split("[.:]", call.name)[-1]}"' in SOURCES[call.module]


def test_no_instance_is_stale():
    used = {(call.module, ast.unparse(call.node.func).rpartition(".")[0]) for call in CALLS if call.method}
    assert used == {(module, name) for module, named in INSTANCES.items() for name in named}


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("policy.optimizer.load_state_dict(state)", None),
        ("policy.optimizer.load_state_dict(state, stricter=1)", "unexpected keyword"),
        ("policy.optimizer.loads(state)", "no attribute 'loads'"),
        ("from ray import get\n    get(refs, timeout=1)", None),
        ("from ray import get\n    get(refs, seconds=1)", "unexpected keyword"),
        ("from ray import get\n    how = {'seconds': 1}\n    get(refs, **how)", "unexpected keyword"),
        ("from ray import get\n    get(*refs, **how)", None),
        ("from ray import get\n    get()", "missing a required"),
    ],
)
def test_a_call_that_does_not_fit_is_found(source, problem):
    (call,) = calls("grpo_mcore.checkpoint.optimizer_state", f"def f():\n    {source}")
    found = misfit(call)
    assert (found is None) if problem is None else (problem in found)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("deepscaler_*.yaml")), ids=lambda path: path.stem)
def test_an_engine_on_a_gpu_is_asked_for_what_vllm_knows(path):
    from vllm.engine.arg_utils import AsyncEngineArgs

    cfg: config.Config = file.load(path)
    arguments = engine.arguments(cfg, "folder", cuda=True, alone=False)
    inspect.signature(AsyncEngineArgs).bind(**arguments)


def test_trainers_choose_in_nccl_what_vllm_pins_for_engines_that_do_not_depend_on_their_batch(monkeypatch):
    """Ranks of one communicator that choose otherwise wait for each other."""
    names = ("vllm.model_executor.determinism", "vllm.model_executor.layers")  # 0.32, 0.26
    pins = importlib.import_module(next(name for name in names if importlib.util.find_spec(name)) + ".batch_invariant")
    monkeypatch.setattr(os, "environ", {})
    pins.override_envs_for_invariance()
    pinned = {name: value for name, value in os.environ.items() if name.startswith("NCCL_")}
    # The algorithm of other collectives is left open there, or is one of all that there are.
    algorithm, ours = (chosen.pop("NCCL_ALGO") for chosen in (pinned, dict(topology.DETERMINISTIC_NCCL)))
    assert ours.endswith("allreduce:tree") and algorithm.endswith("allreduce:tree")
    assert {**pinned, "NCCL_ALGO": ours} == topology.DETERMINISTIC_NCCL
