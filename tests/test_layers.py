"""Who may import whom. The house is described in docstrings (grpo_mcore/__init__.py and those of the rooms); here it is
compared with the source, read with `ast`: imports within functions count, and so do import_module("...") and the
attribute torch.distributed.

Not covered here: names that are put together at run time.
"""

import ast
import sys
from pathlib import Path

import pytest

from grpo_mcore import __main__ as house
from tests.dist import ROOT

PACKAGE = "grpo_mcore"
REFUSED_NAMES = {"utils", "util", "common", "helpers", "helper", "misc", "base", "manager", "worker"}
FLOORS = house.floors()
ROOMS = {name: house.room(name) for floor in FLOORS for name in floor}
LIBRARIES = {library: set(homes) for library, *homes in house.table("Libraries")}
PURE = {module: set(allowed) for module, *allowed in house.table("Pure modules")}


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
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            name = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
            if isinstance(name, ast.Constant):
                found.add(str(name.value).rstrip("."))
    return found


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def sources(folder: str) -> dict[str, Path]:
    """Modules by their dotted names."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted((ROOT / folder).rglob("*.py"))
    }


MODULES = {name: path for name, path in sources(PACKAGE).items() if name not in (PACKAGE, f"{PACKAGE}.__main__")}
IMPORTS = {module: imports(path.read_text(), module) for module, path in MODULES.items()}
OUTSIDE = {m: imports(path.read_text(), m) for f in ("launch", "benchmarks") for m, path in sources(f).items()}


def room_of(name: str) -> str:
    """grpo_mcore.parallel.vocab.combine -> parallel"""
    return name.split(".")[1]


def module_of(name: str) -> str:
    """grpo_mcore.parallel.vocab.combine -> grpo_mcore.parallel.vocab"""
    while name not in MODULES:
        name = name.rpartition(".")[0]
    return name


def own(names: set[str]) -> set[str]:
    return {name for name in names if name.startswith(PACKAGE + ".")}


ARROWS = {
    room: {room_of(name) for m in MODULES if room_of(m) == room for name in own(IMPORTS[m])} - {room} for room in ROOMS
}


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
        "grpo_mcore.config",
        "grpo_mcore.loss",
        "grpo_mcore.parallel.topology.connect",
        "grpo_mcore.batch",
        "transformers.AutoConfig",
        "torch.distributed",
        "megatron.core",
        "ray",
        "triton",
    }


def test_every_room_and_file_has_a_floor_and_says_what_it_does():
    parts = {room_of(module) for module in MODULES}
    assert parts == set(ROOMS), "name it in the floors of grpo_mcore/__init__.py"
    assert [name for name, room in ROOMS.items() if not room.sentence] == []


@pytest.mark.parametrize("path", sorted((ROOT / PACKAGE).rglob("__init__.py")), ids=lambda path: path.parent.name)
def test_a_rooms_init_holds_its_docstring_alone(path):
    """Importing a light module must not load a heavy one beside it."""
    (docstring,) = ast.parse(path.read_text()).body
    assert isinstance(docstring, ast.Expr) and isinstance(docstring.value, ast.Constant)


@pytest.mark.parametrize("room", ROOMS)
def test_no_import_runs_up(room):
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    assert {other for other in ARROWS[room] if floor[other] < floor[room]} == set()


def test_no_two_rooms_import_each_other_even_by_a_detour():
    def walk(room: str, path: tuple[str, ...]) -> None:
        assert room not in path, " -> ".join([*path[path.index(room) :], room])
        if room not in clean:
            for other in sorted(ARROWS[room]):
                walk(other, (*path, room))
            clean.add(room)

    clean: set[str] = set()
    for room in ROOMS:
        walk(room, ())


@pytest.mark.parametrize("name", [name for name, room in ROOMS.items() if room.files])
def test_a_room_says_what_it_uses_and_which_of_its_modules_are_doors(name):
    users = [*((m, IMPORTS[m]) for m in MODULES if room_of(m) != name), *OUTSIDE.items()]
    doors = {module_of(n).split(".")[2] for _, names in users for n in own(names) if room_of(n) == name}
    assert (set(ROOMS[name].doors), set(ROOMS[name].uses)) == (doors, ARROWS[name])


def test_kernels_and_parallel_are_blind_to_each_other():
    assert ARROWS["kernels"] | ARROWS["parallel"] <= {"config", "types"}


def test_nothing_in_the_package_imports_programs_or_tests():
    for module, names in IMPORTS.items():
        assert not [name for name in names if name.split(".")[0] in ("launch", "tests", "benchmarks")], module


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_is_imported_only_where_it_is_at_home(library):
    users = {m for m, names in IMPORTS.items() if any(is_within(name, library) for name in names)}
    homes = {f"{PACKAGE}.{home}" for home in LIBRARIES[library]}
    assert {user for user in users if not any(is_within(user, home) for home in homes)} == set()
    assert {home for home in homes if not any(is_within(user, home) for user in users)} == set()


@pytest.mark.parametrize("module", PURE)
def test_the_mathematics_needs_next_to_nothing(module):
    room = module.split(".")[0]
    allowed = PURE[module] | {other for other in PURE if other.split(".")[0] == room}
    foreign = {
        name
        for name in IMPORTS[f"{PACKAGE}.{module}"]
        if name.split(".")[0] not in sys.stdlib_module_names
        and not any(is_within(name.removeprefix(f"{PACKAGE}."), a) for a in allowed)
    }
    assert not foreign


def test_no_file_has_a_name_that_says_nothing():
    for folder in (PACKAGE, "launch", "benchmarks", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not set(path.stem.split("_")) & REFUSED_NAMES, path.relative_to(ROOT)
