"""What README.md, CONTRIBUTING.md and docs/*.md name exists: links and their anchors, paths, configuration keys,
programs and their options, make targets; every YAML block loads as a configuration.

Not covered here: whether what they say of it is true.
"""

import dataclasses
import re
import shutil
import typing

import pytest
import yaml

from grpo_mcore.config import config, file as config_file
from tests.dist import ROOT

PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [(name, text) for name, page in PAGES.items() for language, text in FENCE.findall(page) if language == "yaml"]
FOLDERS = ("grpo_mcore", "launch", "benchmarks", "configs", "tests", "docs", ".ci")
# Pages may name a room's files from the package: `policy/model.py`, and its modules as in code: `loss.batch`.
ROOMS = [path.name for path in (ROOT / "grpo_mcore").iterdir() if path.is_dir()]
TESTS = {name for path in ROOT.glob("tests/**/*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)}
PROGRAM = re.compile(r"(?<![\w/])(?:launch|benchmarks)/\w+\.py")
# What a block that shows a few keys leaves out, with room for whatever it says of lengths.
REST = {
    "model": "models/quickstart",
    "run_dir": "runs/docs",
    "num_steps": 1,
    "data": {"train": "arithmetic:two_digit_sums/train"},
    "batch": {"max_tokens_per_microbatch": 65536},
}


def code(page: str) -> list[str]:
    """Indented lines, lines of fenced blocks that are no YAML, and inline code."""
    found = [line for language, block in FENCE.findall(page) if language != "yaml" for line in block.splitlines()]
    text = FENCE.sub("", page)
    found += re.findall(r"^    .*", text, re.MULTILINE)
    return found + [" ".join(inline.split()) for inline in re.findall(r"`([^`]+)`", text)]


def words(page: str) -> list[str]:
    return [word for line in code(page) for word in line.split()]


def keys(cls: type, prefix: str = "") -> dict[str, bool]:
    """Dotted key -> whether it is a section."""
    found = {}
    for name, hint in typing.get_type_hints(cls).items():
        section = next((h for h in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(h)), None)
        found[prefix + name] = section is not None
        found |= keys(section, f"{prefix}{name}.") if section else {}
    return found


KEYS = keys(config.Config)


def unknown_keys(page: str) -> list[str]:
    """`section.key` and `section.key=value` that are neither a key nor a module of a room of that name."""
    found = []
    for word in words(page):
        match = re.fullmatch(r"\[?([a-z_0-9]+)\.([a-z_0-9]+)(?:[=:,.\]].*)?", word)
        if not match or not KEYS.get(match[1]) or match[2] in ("py", "yaml", "json", "jsonl", "md", "png"):
            continue
        if f"{match[1]}.{match[2]}" not in KEYS and not (ROOT / "grpo_mcore" / match[1] / f"{match[2]}.py").is_file():
            found.append(f"{match[1]}.{match[2]}")
    return found


def missing_paths(page: str) -> list[str]:
    """Paths from the root or the package, and names of Python files, that are not there; * is a wildcard. What a run
    makes (runs/..., RUN/...) and names with a placeholder (ROOM) are not looked for."""
    missing = []
    for word in words(page):
        name = word.strip("()[],;:'\"").removesuffix("...").rstrip("/")
        first, *rest = name.split("/")
        if not re.fullmatch(r"[\w./*-]+", name) or re.search(r"(?<![a-z])[A-Z]{3,}(?![a-z.])", name):
            continue
        if first in FOLDERS and rest:
            where = name
        elif first in ROOMS and rest and name.endswith(".py"):
            where = f"grpo_mcore/{name}"
        elif not rest and name.endswith(".py"):
            where = f"**/{name}"
        elif not rest and name.endswith((".md", ".toml", ".lock")):
            where = name
        else:
            continue
        if not any(".venv" not in path.parts for path in ROOT.glob(where)):
            missing.append(name)
    return missing


def unknown_tests(page: str) -> list[str]:
    return [name for word in words(page) for name in re.findall(r"^(test_\w+)$", word) if name not in TESTS]


def broken_links(name: str, page: str) -> list[str]:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        other = (ROOT / name).parent / path if path else ROOT / name
        headings = re.findall(r"^#+ (.*)$", FENCE.sub("", other.read_text()), re.MULTILINE) if other.is_file() else []
        # A heading's anchor, as the usual hosts make it.
        anchors = [re.sub(r"[^\w\- ]", "", h.strip().lower()).replace(" ", "-") for h in headings]
        if not other.exists() or (anchor and anchor not in anchors):
            broken.append(target)
    return broken


def unknown_commands(page: str) -> list[str]:
    """Make targets, modules, programs and options of programs that are not there."""
    targets = re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    wrong = []
    for line in code(page):
        command = line.split("  #")[0]
        wrong += [f"make {t}" for t in re.findall(r"^\s*make ([a-z][\w-]*)", command) if t not in targets]
        for module in re.findall(r"python\S* -m (grpo_mcore[\w.]*)", command):
            path = ROOT / module.replace(".", "/")
            if not (path / "__main__.py").is_file() and not path.with_suffix(".py").is_file():
                wrong.append(f"python -m {module}")
        program = PROGRAM.search(command)
        if not program:
            continue
        if not (ROOT / program[0]).is_file():
            wrong.append(program[0])
            continue
        known = options(program[0])
        wrong += [
            f"{program[0]} {option}"
            for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", command[program.end() :].split(" -- ")[0])
            if option not in known
        ]
    return wrong


def options(program: str) -> set[str]:
    """As far as they stand in the source of a program, of what all programs share, and of the simulator's question,
    whose fields are options of launch/plan.py."""
    sources = [(ROOT / path).read_text() for path in (program, "grpo_mcore/entry.py")]
    question = (ROOT / "grpo_mcore/plan/predict.py").read_text().split("class Question:")[1].split("    def ")[0]
    fields = re.findall(r"^    (\w+):", question, re.MULTILINE) if program == "launch/plan.py" else []
    return {o for text in sources for o in re.findall(r'"(--[\w-]+)"', text)} | {
        "--" + name.replace("_", "-") for name in fields
    }


WRONG = """
See `grpo_mcore/nowhere.py`, `loss/nothing.py`, `nothing.md`, `data.trian`, `launch/train.py`, `rollout.keep_texts`,
`loss.batch`, `loss.nothing`, `make nothing`, `test_nothing`, `config.yaml`, [a](nothing.md), [b](README.md#nothing),
[c](README.md#two-commands), `python launch/stages.py --cfg FILE --redo`.

    python launch/nothing.py --cfg FILE parallel.tq=2
    python -m grpo_mcore.nothing
"""


def test_what_is_not_there_is_found():
    assert sorted(missing_paths(WRONG)) == [
        "grpo_mcore/nowhere.py",
        "launch/nothing.py",
        "loss/nothing.py",
        "nothing.md",
    ]
    assert sorted(unknown_keys(WRONG)) == ["data.trian", "loss.nothing", "parallel.tq"]
    assert unknown_tests(WRONG) == ["test_nothing"]
    assert broken_links("README.md", WRONG) == ["nothing.md", "README.md#nothing"]
    assert sorted(unknown_commands(WRONG)) == [
        "launch/nothing.py",
        "launch/stages.py --redo",
        "make nothing",
        "python -m grpo_mcore.nothing",
    ]


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    assert broken_links(name, PAGES[name]) == []


@pytest.mark.parametrize("name", PAGES)
def test_files_that_are_named_exist(name):
    assert missing_paths(PAGES[name]) == []


@pytest.mark.parametrize("name", PAGES)
def test_tests_that_are_named_exist(name):
    assert unknown_tests(PAGES[name]) == []


@pytest.mark.parametrize("name", PAGES)
def test_keys_that_are_named_exist(name):
    assert unknown_keys(PAGES[name]) == []


@pytest.mark.parametrize("name", PAGES)
def test_programs_options_and_make_targets_that_are_named_exist(name):
    assert unknown_commands(PAGES[name]) == []


@pytest.mark.parametrize("name, block", BLOCKS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(BLOCKS)])
def test_a_yaml_block_is_a_configuration_that_loads(name, block, tmp_path):
    folder = shutil.copytree(ROOT / "configs", tmp_path / "configs")
    path, tree = folder / "block.yaml", yaml.safe_load(block)
    path.write_text(block)
    if "stages" in tree:
        from grpo_mcore.stages import stages

        assert len(stages.load(path, ranks=None).configs) == len(tree["stages"])
        return
    if "inherit" not in tree:
        (folder / "rest.yaml").write_text(yaml.safe_dump(REST))
        path.write_text("inherit: rest.yaml\n" + block)
    config_file.load(path)


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 90
