"""Who may import whom, read from the source with `ast`: imports within functions count, and so do import_module("...")
and the attribute torch.distributed.

Not covered here: names that are put together at run time.
"""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "grpo_mcore"

# A module may import from its own level and below. parallel and kernels are one level, blind to each other.
LEVELS = [
    ["config", "config_file", "rules", "run_folder", "types", "provenance"],
    ["kernels", "parallel"],
    [
        "prompts",
        "arithmetic",
        "math_answer",
        "boxed_answer",
        "verifiers",
        "grading_process",
        "reward",
        "shaping",
        "scores",
        "advantage",
        "batch",
        "logprob",
        "loss",
        "recipe",
        "dispatch",
        "admission",
        "stop",
    ],
    [
        "model",
        "hf_weights",
        "policy",
        "engine",
        "placement",
        "engines",
        "refit",
        "weight_transfer",
        "senders",
        "live_weights",
        "receiver",
        "checkpoint",
        "stored",
        "convert",
        "parity",
        "metrics",
        "plan",
        "plan_time",
    ],
    ["rollout", "evaluate", "warm_start", "curves", "cluster", "simulated_engine", "simulate", "predict", "report"],
    ["trainer", "entry", "lineage", "stages", "stage_actions"],
    ["fit"],
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}

# Library -> the modules that may import it.
LIBRARIES = {
    "torch.distributed": {
        "parallel",
        "weight_transfer",
        "senders",
        "live_weights",
        "receiver",
        "checkpoint",
        "stored",
    },  # the last two: its checkpoint format
    "triton": {"kernels"},
    "vllm": {"engine", "senders", "live_weights", "receiver"},
    "ray": {"engines", "placement"},
    "megatron": {"parallel", "model", "policy", "refit", "checkpoint", "convert"},
    "transformers": {"prompts", "model", "hf_weights", "arithmetic", "parity"},
}

# All that these import, beside the standard library.
PURE = {
    "dispatch": set(),
    "admission": set(),
    "stop": {f"{PACKAGE}.config"},
    "shaping": {"torch", f"{PACKAGE}.config", f"{PACKAGE}.types"},
    "scores": set(),
    "run_folder": {"yaml", f"{PACKAGE}.config"},
    "curves": {"matplotlib", f"{PACKAGE}.run_folder"},
    "report": {"yaml", f"{PACKAGE}.config", f"{PACKAGE}.curves", f"{PACKAGE}.run_folder"},
    "advantage": {"torch", f"{PACKAGE}.config", f"{PACKAGE}.types"},
    "loss": {"torch", f"{PACKAGE}.config", f"{PACKAGE}.types"},
    "math_answer": {"math_verify"},
    "boxed_answer": {"sympy", "latex2sympy2_extended", f"{PACKAGE}.math_answer"},
    "verifiers": {f"{PACKAGE}.boxed_answer", f"{PACKAGE}.math_answer"},
    "grading_process": {f"{PACKAGE}.verifiers"},
    "reward": {f"{PACKAGE}.grading_process", f"{PACKAGE}.math_answer", f"{PACKAGE}.verifiers"},
}

REFUSED_NAMES = {"utils", "util", "common", "helpers", "helper", "misc", "base", "manager", "worker"}


def imports(source: str, module: str) -> set[str]:
    """Dotted names that the source of `module` imports: of `from a import b`, a.b."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                origin = ".".join([*module.split(".")[: -node.level], *([node.module] if node.module else [])])
            found |= {f"{origin}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            found.add("torch.distributed")
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__")
            and node.args
        ):
            name = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
            if isinstance(name, ast.Constant):
                found.add(str(name.value).rstrip("."))
    return found


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / PACKAGE).rglob("*.py"))
}
IMPORTS = {module: imports(path.read_text(), module) for module, path in MODULES.items()}
PARTS = sorted({module.split(".")[1] for module in MODULES if module != PACKAGE})


def part_of(name: str) -> str:
    """grpo_mcore.parallel.vocab.combine -> parallel"""
    return name.split(".")[1]


def own_imports(module: str) -> set[str]:
    """The parts of the package that a module imports, without its own."""
    return {part_of(name) for name in IMPORTS[module] if name.startswith(PACKAGE + ".")} - {part_of(module)}


def test_the_scanner_sees_imports_wherever_they_hide():
    source = """
import vllm.engine
from grpo_mcore import config, loss as l
from .topology import connect
from .. import batch
def f():
    from transformers import AutoConfig
    torch.distributed.barrier()
    importlib.import_module("megatron.core")
    importlib.import_module(f"ray.{name}")
if __name__ == "__main__":
    import triton
"""
    assert imports(source, "grpo_mcore.parallel.vocab") == {
        "vllm.engine",
        "grpo_mcore.config.config",
        "grpo_mcore.loss.loss",
        "grpo_mcore.parallel.topology.connect",
        "grpo_mcore.loss.batch",
        "transformers.AutoConfig",
        "torch.distributed",
        "megatron.core",
        "ray",
        "triton",
    }


def test_every_module_has_a_level():
    assert [part for part in PARTS if part not in LEVEL] == [], "give it a level here and in the design"


@pytest.mark.parametrize("module", [m for m in MODULES if m != PACKAGE])
def test_a_module_imports_only_from_its_own_level_and_below(module):
    mine = LEVEL[part_of(module)]
    above = {part for part in own_imports(module) if LEVEL[part] > mine}
    assert not above, (
        f"{module} (level {mine}) imports {', '.join(f'{part} (level {LEVEL[part]})' for part in sorted(above))}"
    )


def test_kernels_and_parallel_are_blind_to_each_other():
    for module in MODULES:
        if module != PACKAGE and part_of(module) in ("kernels", "parallel"):
            assert own_imports(module) <= {"config", "types"}, module


def test_no_two_modules_import_each_other_even_by_a_detour():
    graph = {part: set() for part in PARTS}
    for module in MODULES:
        if module != PACKAGE:
            graph[part_of(module)] |= own_imports(module)

    def walk(part: str, path: tuple[str, ...]) -> None:
        assert part not in path, " -> ".join([*path[path.index(part) :], part])
        if part not in clean:
            for other in sorted(graph[part]):
                walk(other, (*path, part))
            clean.add(part)

    clean: set[str] = set()
    for part in PARTS:
        walk(part, ())


def test_nothing_in_the_package_imports_programs_or_tests():
    for module, names in IMPORTS.items():
        assert not [name for name in names if name.split(".")[0] in ("launch", "tests", "benchmarks")], module


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_is_imported_only_where_it_is_at_home(library):
    users = {part_of(module) for module, names in IMPORTS.items() if any(is_within(name, library) for name in names)}
    assert users <= LIBRARIES[library]


@pytest.mark.parametrize("part", PURE)
def test_the_mathematics_needs_next_to_nothing(part):
    foreign = {
        name
        for name in IMPORTS[f"{PACKAGE}.{part}"]
        if name.split(".")[0] not in sys.stdlib_module_names
        and not any(is_within(name, allowed) for allowed in PURE[part])
    }
    assert not foreign


def test_no_file_has_a_name_that_says_nothing():
    for folder in (PACKAGE, "launch", "benchmarks", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not set(path.stem.split("_")) & REFUSED_NAMES, path.relative_to(ROOT)
