"""What is published: extras that bring what they promise, links that lead somewhere, files that are whole."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import yaml

from hf_zipit.errors import ZipItError
from hf_zipit.extras import EXTRAS, require

ROOT = Path(__file__).parents[1]
tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_every_extra_brings_the_package_that_it_is_named_for():
    extras = PROJECT["optional-dependencies"]
    for package, extra, _ in EXTRAS.values():
        assert any(re.split(r"[><=\[]", each)[0] == package for each in extras[extra]), package
        assert extra in extras["all"][0]
    base = {re.split(r"[><=\[]", each)[0] for each in PROJECT["dependencies"]}
    assert base & {package for package, *_ in EXTRAS.values()} == set()


def test_what_is_missing_is_told_with_its_extra(monkeypatch):
    monkeypatch.setattr("hf_zipit.extras.find_spec", lambda name: None)
    with pytest.raises(ZipItError, match=r"matplotlib is not installed, .*pip install 'hf-zipit\[plots\]'"):
        require("matplotlib")


def test_links_of_the_readme_are_absolute_where_it_is_published():
    spec = importlib.util.spec_from_file_location("publishable", ROOT / ".ci" / "publishable.py")
    publishable = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(publishable)
    text = publishable.absolute((ROOT / "README.md").read_text(), "somebody")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links and all(link.startswith(("https://", "#")) for link in links)
    inside = [link.partition("/blob/main/")[2].partition("#")[0] for link in links if "somebody" in link]
    assert all((ROOT / path).exists() for path in inside)


def test_the_files_around_the_code_are_whole():
    for path in [*(ROOT / ".github").rglob("*.yml"), ROOT / "CITATION.cff", ROOT / ".pre-commit-config.yaml"]:
        assert yaml.safe_load(path.read_text()), path
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == PROJECT["version"]
    tested = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())["jobs"]["tests"]["strategy"]["matrix"]
    named = [
        c.rpartition(" ")[2] for c in PROJECT["classifiers"] if c.startswith("Programming Language :: Python :: 3.")
    ]
    assert tested["python"] == named
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in named


def test_the_conda_recipe_asks_for_what_the_package_does():
    recipe = yaml.safe_load((ROOT / "conda" / "recipe.yaml").read_text())
    assert recipe["context"]["version"] == PROJECT["version"]
    names = {"torch": "pytorch", "huggingface-hub": "huggingface_hub"}
    wanted = {re.sub(r"^[\w-]+", lambda name: names.get(name[0], name[0]), each) for each in PROJECT["dependencies"]}
    asked = {each.replace(" ", "") for each in recipe["requirements"]["run"]}
    assert asked == {*wanted, f"python{PROJECT['requires-python']}"}
