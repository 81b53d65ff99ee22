"""The rooms of the package: imports go down one list of them, never up, and no module imports itself in a circle.

Read from the source, so that imports inside functions count as well, and those for type checkers alone.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import hf_zipit

ROOMS = (
    "errors", "extras", "registry", "files", "schema", "config", "steady", "lazy", "factorise",  # tools
    "adapters", "symmetry", "maps", "planning",  # what a model is, and what merging it would mean
    "hub", "modeling", "experts",  # models: merged ones, and those they are made of
    "data", "observation", "align", "combine", "assembly", "refit", "layerwise",  # the stages
    "correct", "polish", "residues",  # and what changes a model that is there
    "evaluation", "recipe", "merging", "lora", "landscapes", "searching", "grouping", "report", "running",
    "auto_classes",
    "",  # the face
    "app",
    "cli",
)  # fmt: skip
"""From the ground up: a room may import those before it."""

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


def test_one_name_is_one_class() -> None:
    homes = defaultdict(list)
    for module, path in MODULES.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(module)
    assert {name: found for name, found in homes.items() if len(found) > 1} == {}


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
    found = set(imported("modeling.base", source, "modeling"))
    seen = {"cli.app", "files", "modeling.heads", "modeling.joint", "recipe.sections", "running.run", "merging", ""}
    assert found == seen
    up = ["cli.app", "merging", "recipe.sections", "running.run", ""]
    assert upwards({"modeling.base": found}) == sorted(f"modeling.base -> {target}" for target in up)
