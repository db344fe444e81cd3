"""Prints the house: floors, rooms, one sentence each. `python -m grpo_mcore`."""

import ast
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Room:
    """A folder of the package, or one of the files beside them, as its docstring describes it."""

    name: str
    sentence: str  # what it does
    doors: tuple[str, ...]  # modules of it that others may import; a file has none
    uses: tuple[str, ...]  # rooms that it imports
    files: tuple[str, ...]


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text())) or ""


def words(text: str, label: str) -> tuple[str, ...]:
    """The words after `label:` in a docstring, up to the next empty line or label."""
    found = re.search(rf"^{label}:((?:[^\n]*\n?)(?:^ +[^\n]*\n?)*)", text, re.MULTILINE)
    return tuple(found.group(1).split()) if found else ()


def table(heading: str) -> list[list[str]]:
    """The words of each row of the package's table that a paragraph beginning with `heading` announces."""
    rows = docstring(ROOT / "__init__.py").split(f"\n{heading}", 1)[1].split("\n\n")[1]
    return [row.split() for row in rows.splitlines()]


def floors() -> list[list[str]]:
    """Names of rooms, from the top down."""
    return table("Floors")


def room(name: str) -> Room:
    folder = ROOT / name
    text = docstring(folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py"))
    files = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    sentence = re.match(r".*?\.(?=\s|$)", " ".join(text.split()))
    return Room(name, sentence.group() if sentence else "", words(text, "Doors"), words(text, "Uses"), tuple(files))


def describe() -> str:
    lines = [docstring(ROOT / "__init__.py").splitlines()[0], "From the top floor down; * marks a room's doors.", ""]
    for floor in floors():
        for here in map(room, floor):
            lines.append(f"{here.name:11} {here.sentence}")
            if here.files:
                lines.append(f"{'':11} {' '.join(f + '*' * (f in here.doors) for f in here.files)}")
        lines.append("")
    return "\n".join(lines[:-1])


if __name__ == "__main__":
    print(describe())
