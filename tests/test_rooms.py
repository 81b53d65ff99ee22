"""The rooms of the package: imports go down one list of them, never up, and no module imports itself in a circle.

Read from the source, so that imports inside functions and for type checkers alone count as well.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import hf_zipit

ROOMS = (
    "errors", "registry", "files", "schema", "config",  # tools
    "adapters", "symmetry", "maps", "planning",  # what a model is, and what merging it would mean
    "hub", "modeling", "experts",  # models: merged ones, and those they are made of
    "data", "observe", "align", "combine", "assembly", "refit", "correct",  # the stages
    "evaluation", "report", "recipe", "merging", "landscapes", "searching", "running",
    "",  # the face
    "cli",
)  # fmt: skip
"""From the ground up: a room may import those before it."""

STILL_OPEN = {
    "modeling.base", "modeling.hub", "report.frontier", "report.landscape", "report.plots", "report.tables",
}  # fmt: skip
"""Modules whose imports for type checkers alone do not count yet."""

PACKAGE = Path(hf_zipit.__file__).parent


def modules() -> dict[str, Path]:
    """Every module by its name within the package; the package itself is `""`."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(module: str, source: str, package: str) -> Iterator[str]:
    """The modules of the package that one imports, wherever in it.

    Args:
        module: the importing one.
        source: its text.
        package: the one that its relative imports start from.
    """
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if module in STILL_OPEN and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = f"hf_zipit.{package}".rstrip(".").split(".")
            start = start[: len(start) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        for name in names:
            root, _, inside = name.partition(".")
            if root == "hf_zipit":
                target = inside if inside in MODULES else inside.rpartition(".")[0]
                if target != module:
                    yield target


def graph() -> dict[str, set[str]]:
    """What every module imports."""
    found = {}
    for name, path in MODULES.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        found[name] = set(imported(name, path.read_text(encoding="utf-8"), package))
    return found


def room(module: str) -> str:
    return module.partition(".")[0]


def upwards(edges: dict[str, set[str]]) -> list[str]:
    """Imports that do not go down the list."""
    return [
        f"{module} -> {target}"
        for module, targets in edges.items()
        for target in sorted(targets)
        if room(target) != room(module) and ROOMS.index(room(target)) >= ROOMS.index(room(module))
    ]


def test_every_room_is_in_the_list() -> None:
    assert {room(module) for module in MODULES} == set(ROOMS)


def test_imports_go_down_the_list_of_rooms() -> None:
    assert upwards(graph()) == []


def test_no_module_imports_itself_in_a_circle() -> None:
    TopologicalSorter(graph()).prepare()  # raises a CycleError that names the modules


def test_what_takes_seconds_is_imported_when_it_is_used() -> None:
    code = (
        "import sys, hf_zipit, hf_zipit.report.plots; print({'evaluate', 'matplotlib', 'optuna'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
    assert hf_zipit.metrics.__name__ == "hf_zipit.evaluation.metrics"


def test_imports_are_found_wherever_they_stand() -> None:
    source = """
from typing import TYPE_CHECKING
from hf_zipit.cli import app
from ..files import adding_to
from . import heads
from .joint import vote
if TYPE_CHECKING:
    from hf_zipit.running.run import run_recipe
def later():
    import hf_zipit.recipe.sections
    from hf_zipit import merging, merge
"""
    found = set(imported("modeling.trunk", source, "modeling"))
    up = {"cli.app", "merging", "recipe.sections", "running.run", ""}
    assert found == up | {"files", "modeling.heads", "modeling.joint"}
    assert upwards({"modeling.trunk": found}) == [f"modeling.trunk -> {target}" for target in sorted(up)]
