"""The rooms of docs/architecture.md: arrows point one way, also inside functions, and no files form a circle."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "regate_megatron"
# A room imports what stands in lines above its own; rooms of one line do not know each other.
FLOORS = (
    ("errors",),
    ("compat",),
    ("method", "ranks"),
    ("config", "batches", "memory"),
    ("flags",),
    ("support",),
    ("decoder",),
    ("teacher",),
    ("checkpoints", "step"),
    ("api",),
    ("integrations",),
    ("cpu",),
    ("doctor", "__init__"),
    ("__main__",),
)


def _imports(file: Path) -> Iterator[str]:
    """The modules of the package that a file imports anywhere, but for type checkers alone."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if _file_of(name) else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE.name)


def _file_of(module: str) -> Path | None:
    path = PACKAGE.joinpath(*module.split(".")[1:])
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def _room(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(PACKAGE.rglob("*.py"))
EDGES = {file: {found for name in _imports(file) if (found := _file_of(name)) not in (None, file)} for file in FILES}


def test_every_room_stands_on_one_floor():
    assert {_room(file) for file in FILES} == {room for floor in FLOORS for room in floor}


@pytest.mark.parametrize("room", [room for floor in FLOORS for room in floor])
def test_a_room_knows_the_rooms_below_it_alone(room):
    floor = next(number for number, rooms in enumerate(FLOORS) if room in rooms)
    below = {one for rooms in FLOORS[:floor] for one in rooms} | {room}
    seen = {(str(file.relative_to(PACKAGE)), _room(to)) for file in FILES if _room(file) == room for to in EDGES[file]}
    assert {edge for edge in seen if edge[1] not in below} == set()


def test_no_files_form_a_circle():
    """What is left after files without imports are taken away, again and again, are circles and what leads to them."""
    left = {file: set(to) for file, to in EDGES.items()}
    while free := {file for file, to in left.items() if not to & left.keys()}:
        left = {file: to for file, to in left.items() if file not in free}
    assert sorted(str(file.relative_to(PACKAGE)) for file in left) == []


def test_the_page_lists_the_rooms_in_this_order():
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    table = page.partition("| room | what it knows |")[2].partition("\n\n")[0]
    listed = [set(re.findall(r"`(\w+)`", line.split("|")[1])) for line in table.splitlines()[2:]]
    assert listed == [set(floor) for floor in FLOORS[: len(listed)]] and len(listed) == len(FLOORS) - 2
