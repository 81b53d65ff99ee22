"""Every code block of the README and the documentation runs, in the order of its page.

A page's Python blocks share one namespace, as if they were pasted one after the other; commands run in the same
folder, where small models and data lie under the names that the pages use (`docs_world.py`): `me/vit-clothes` is then
a folder and not a repo, and the code is the same. YAML blocks are checked as recipes. A block that cannot run here
says so in a comment before it, `<!-- not run: WHY -->`, and is compiled or parsed.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import hf_zipit
from hf_zipit.cli import main
from hf_zipit.cli.commands import app
from hf_zipit.config import PolishConfig, RefitConfig
from hf_zipit.hub.cache import looks_local
from hf_zipit.recipe.loading import check_recipe
from hf_zipit.recipe.sections import Recipe
from hf_zipit.registry import ADAPTERS, CORRECTIONS, LORA_RULES, METHODS, RESIDUES, ROUTERS, RULES, TRAININGS

from .docs_world import make_world
from .running.worker import RUN

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
GENERATED = ("results.md",)
"""Pages that a script writes, with tables and no code of their own."""

LANGUAGES = ("python", "bash", "yaml", "text")
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```$", re.DOTALL | re.MULTILINE
)
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->\s*\Z", re.DOTALL)
REGISTRIES = (METHODS, RULES, LORA_RULES, CORRECTIONS, TRAININGS, RESIDUES, ROUTERS, ADAPTERS)

FEW_STEPS: dict[type[Any], dict[str, int]] = {
    RefitConfig: {"attention_steps": 4, "unit_steps": 8, "answer_steps": 8},
    PolishConfig: {"steps": 4, "evaluate_every": 2},
}
"""Defaults of what is fitted in many steps: here it is enough that it runs."""

FEW = 9
"""So many blocks may be left unrun, in all pages together."""


@dataclass(frozen=True)
class Block:
    """A code block: its language, its text, the line it starts at, and why it is not run."""

    language: str
    code: str
    line: int
    excuse: str | None


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        before = text[: found.start()]
        excuse = NOT_RUN.search(before)
        code = re.sub(rf"^{found['indent']}", "", found["code"], flags=re.MULTILINE)
        yield Block(found["language"], code, before.count("\n") + 2, excuse.group(1) if excuse else None)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all models and data sets that the pages name."""
    return make_world(tmp_path_factory.mktemp("docs"))


@pytest.fixture(scope="module")
def done() -> set[str]:
    """The commands that were run in that folder: none is run twice."""
    return set()


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in GENERATED], ids=name)
def test_the_blocks_of_a_page_run(page: Path, world: Path, done: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = list(blocks_of(page))
    assert all(block.language in LANGUAGES for block in blocks), "every block says what language it is in"
    if all(block.language == "text" for block in blocks):
        pytest.skip("no code")
    monkeypatch.chdir(world)
    for settings, few in FEW_STEPS.items():
        init = settings.__init__.__wrapped__
        monkeypatch.setattr(init, "__kwdefaults__", {**init.__kwdefaults__, **few})
    for registry in REGISTRIES:  # what a page registers is for that page alone
        registry.names()
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    namespace: dict[str, Any] = {"__name__": "docs"}  # a page defines every name that it uses
    if page.name == "README.md":  # what `make quickstart` does after installing
        run_once("hf-zipit run recipes/quickstart.yaml", done, monkeypatch)
    for block in blocks:
        where = f"{name(page)}:{block.line}"
        if block.language == "python":
            run_python(block, namespace, where)
        elif block.language == "bash":
            run_bash(block, done, monkeypatch)
        elif block.language == "yaml":
            check_yaml(block.code, where)


def run_python(block: Block, namespace: dict[str, Any], where: str) -> None:
    # As many empty lines as there are before the block, so that a traceback names the line of the page.
    tree = ast.parse("\n" * (block.line - 1) + block.code, filename=where)
    if block.excuse is None:
        exec(compile(tree, where, "exec"), namespace)


def run_bash(block: Block, done: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(["bash", "-n"], input=block.code, text=True, check=True)
    for command in commands_of(block.code):
        if command.startswith("hf-zipit") and block.excuse is not None:
            parse_command(command)
        elif block.excuse is None:
            run_once(command, done, monkeypatch)


def run_once(command: str, done: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if command not in done:
        run_command(command, monkeypatch)
        done.add(command)


def commands_of(code: str) -> list[str]:
    """The commands of a block, without comments and with continued lines joined."""
    lines = code.replace("\\\n", " ").splitlines()
    return [shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))]


def run_command(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run one of our commands here, and any other as a process; it must end well."""
    words = shlex.split(command)
    if words[0] == "hf-zipit":
        monkeypatch.setattr(sys, "argv", words)
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        # The doctor ends with 1 where something is amiss on this machine.
        assert code == 0 or words[1] == "doctor", f"{command} ended with {code}"
        return
    if words[0] == "torchrun":  # of the same recipe `tests/running` does it, in the one launch of all such tests
        ours = words[words.index("hf_zipit.cli") + 1 :]
        assert ours[: len(RUN)] == RUN, f"{command} is run nowhere; say why before its block"
        parse_command(shlex.join(["hf-zipit", *ours]))
        return
    assert words[0] == "python", f"{command} cannot be run here; say why before its block"
    words = [sys.executable, *words[1:]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"


def parse_command(command: str) -> None:
    """Whether one of our commands would be understood; it is not run."""
    words = shlex.split(command)[1:]
    group = app.group
    _, found, arguments = group.resolve_command(group.make_context("hf-zipit", ["doctor"]), words)
    found.make_context(words[0], list(arguments))


BASE = {
    "name": "docs",
    "experts": {"clothes": {"model": "me/vit-clothes"}, "shoes": {"model": "me/vit-shoes"}},
    "calibration": {"dataset": "me/pictures"},
    "evaluation": {"dataset": "me/pictures"},
}


def check_yaml(code: str, where: str) -> None:
    """A whole recipe, or some of its keys."""
    content = yaml.safe_load(code)
    assert isinstance(content, dict), f"{where} is no mapping"
    recipe = Recipe.from_dict(content if "experts" in content and "name" in content else {**BASE, **content})
    sources = [entry.model for entry in recipe.experts.values() if entry.model]
    for source in sources:
        if looks_local(source):
            Path(source).mkdir(parents=True, exist_ok=True)
            Path(source, "config.json").touch()
    check_recipe(recipe)


def test_few_blocks_are_left_out_and_each_says_why() -> None:
    excuses = {f"{name(page)}:{b.line}": b.excuse for page in PAGES for b in blocks_of(page) if b.excuse}
    assert len(excuses) <= FEW, excuses
    assert all(len(excuse) > 10 for excuse in excuses.values())


def test_a_block_that_fails_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError):
        run_python(Block("python", "assert 1 == 2\n", 3, None), {}, "here")
    with pytest.raises(SyntaxError):
        run_python(Block("python", "assert 1 = 2\n", 3, "it needs the network"), {}, "here")
    with pytest.raises(AssertionError, match="ended with 1"):
        run_command("hf-zipit run nowhere.yaml", monkeypatch)
    with pytest.raises(AssertionError, match="is run nowhere"):
        run_command("torchrun --nproc_per_node 2 -m hf_zipit.cli run other.yaml", monkeypatch)
    with pytest.raises(AssertionError, match="cannot be run here"):
        run_command("make clean", monkeypatch)
    with pytest.raises(Exception, match="No such option"):
        parse_command("hf-zipit run recipe.yaml --nope")
    with pytest.raises(ValueError, match="did you mean 'depth'"):
        check_yaml("dept: 1", "here")


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", prose):
            if "://" in target or Path(target).name in GENERATED:
                continue
            there = page.parent / target  # a notebook becomes a page of its name
            assert there.exists() or there.with_suffix(".ipynb").exists(), f"{name(page)} links to {target}"


def test_the_site_has_every_page() -> None:
    def files(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        for inner in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
            yield from files(inner)

    named = list(files(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    notebooks = {f"notebooks/{path.stem}.md" for path in (ROOT / "docs" / "notebooks").glob("*.ipynb")}
    assert len(named) == len(set(named))
    assert set(named) == pages | notebooks | set(GENERATED)


def test_every_equation_can_be_shown() -> None:
    pytest.importorskip("latex2mathml")
    sys.path.insert(0, str(ROOT))
    from mkdocs_math import MARKED, to_mathml

    for page in PAGES:
        prose = FENCE.sub("", page.read_text(encoding="utf-8"))
        for latex in re.findall(r"\\\((.+?)\\\)|\\\[(.+?)\\\]", prose, re.DOTALL):
            assert "<math" in to_mathml(latex[0] or latex[1], bool(latex[1]), name(page))
    assert MARKED.search(r'<span class="arithmatex">\(x\)</span>')["latex"] == "x"
    with pytest.raises(ValueError, match="here: .*arg"):
        to_mathml(r"\arg x", False, "here")


def test_every_method_and_every_public_name_has_its_page() -> None:
    pages = {page.stem for page in (ROOT / "docs" / "methods").glob("*.md")}
    assert set(METHODS.names()) <= pages
    corrections = (ROOT / "docs" / "corrections.md").read_text()
    assert all(f"`{correction}`" in corrections for correction in CORRECTIONS.names())
    api = (ROOT / "docs" / "api.md").read_text()
    assert [public for public in hf_zipit.__all__ if f"hf_zipit.{public}" not in api] == []
    overview = (ROOT / "docs" / "methods" / "index.md").read_text()
    assert all(f"({method}.md)" in overview for method in METHODS.names())
