"""The rules of the layout that the README draws: rooms, imports in one direction, readable modules."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "toolkit"
MODULES = sorted(PACKAGE.rglob("*.py"))

# A room may import what is listed before it.
ROOMS = (
    "errors", "files", "cache", "budget", "measure", "datasets", "backbones", "methods", "experiment",
    "model", "training", "integrations", "forecast", "baselines", "analysis", "plots", "widgets", "batch",
)  # fmt: skip


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path) for path in MODULES}


def imported_by(path: Path) -> set[str]:
    """Modules of the package that `path` imports anywhere: in functions and for types, too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = names & NAMES
            found |= submodules or {node.module}
    return {name for name in found if name.split(".")[0] == "toolkit"}


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_in_one_direction(path):
    module = name_of(path)
    if room_of(module) in ("", "__main__"):
        return  # the public names and the command line know everything
    place = ROOMS.index(room_of(module))
    above = [name for name in imported_by(path) if room_of(name) not in ROOMS[: place + 1]]
    assert not above, f"{module} imports {', '.join(above)}, which is listed above it"


def test_no_circle_of_imports():
    imports = {name_of(path): imported_by(path) & NAMES for path in MODULES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, "a circle: " + " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for name in imports[module]:
                visit(name, (*path, module))
            done.add(module)

    for module in imports:
        visit(module, ())


def test_the_planner_needs_nothing_of_the_toolkit_but_its_errors():
    for path in (PACKAGE / "budget").rglob("*.py"):
        assert {room_of(name) for name in imported_by(path)} <= {"budget", "errors"}, path.name


def test_modules_have_a_readable_size():
    sizes = {name_of(path): len(path.read_text().splitlines()) for path in MODULES}
    assert {name: size for name, size in sizes.items() if size > 600} == {}
    assert len(list(PACKAGE.glob("*.py"))) <= 8


def test_the_readme_names_every_room_and_notebook():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 150
    shown = set(re.findall(r"\(figures/([^)]+)\)", readme))
    assert shown == {path.name for path in (ROOT / "figures").iterdir()}
    tree = readme.split("## Layout")[1].split("## ")[0]
    assert [room for room in ROOMS if not re.search(rf"\b{room}\b", tree)] == []
    notebooks = [path.stem for path in (ROOT / "notebooks").glob("*.ipynb")]
    assert [name for name in notebooks if f"`{name}`" not in readme] == []
