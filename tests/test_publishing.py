"""What is published: extras that bring what they promise, links that lead somewhere, files that are whole."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


def pins() -> dict[str, str]:
    """The version of every package that `constraints.txt` asks for under this Python."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    asked = [Requirement(line) for line in lines]
    here = [each for each in asked if each.marker is None or each.marker.evaluate()]
    assert len({canonicalize_name(each.name) for each in here}) == len(here)
    return {canonicalize_name(each.name): next(iter(each.specifier)).version for each in here}


def test_everything_that_an_extra_brings_is_pinned_within_its_range():
    pinned = pins()
    extras = PROJECT["optional-dependencies"]
    for each in map(Requirement, [*PROJECT["dependencies"], *(each for extra in extras.values() for each in extra)]):
        if each.name != "hf-zipit":
            assert pinned.get(canonicalize_name(each.name), "") in each.specifier, each


def test_no_pin_is_refused_by_another_package():
    pinned = pins()
    for package in importlib.metadata.distributions():
        if pinned.get(canonicalize_name(package.name)) != package.version:
            continue
        for each in map(Requirement, package.requires or ()):
            pin = pinned.get(canonicalize_name(each.name))
            if pin and (each.marker is None or each.marker.evaluate({"extra": ""})):
                assert each.specifier.contains(pin, prereleases=True), f"{package.name} asks for {each}"


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
