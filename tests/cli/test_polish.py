"""Every kind of training is reached from the command line and from a recipe by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from hf_zipit.config import PolishConfig, RootConfig
from hf_zipit.recipe.loading import load_recipe


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    init = PolishConfig.__init__.__wrapped__  # type: ignore[attr-defined]
    monkeypatch.setattr(init, "__kwdefaults__", {**init.__kwdefaults__, "steps": 2, "evaluate_every": 1})


@pytest.mark.parametrize(
    ("kind", "rule"),
    [("weights", None), ("surgery", None), ("symerge", "ties"), ("concrete", "task-arithmetic")],
)
def test_a_kind_of_polish_is_named(call: Any, vits: Path, tmp_path: Path, kind: str, rule: str | None):
    arguments = [vits / "low", vits / "high", "-c", "sklearn-digits", "--samples", 8, "-m", "identity", "--no-refit"]
    based = ["--combine", rule, "--base", vits / "low"] if rule else []
    code, _, err = call("merge", *arguments, *based, "--polish", kind, "-o", tmp_path / "m", "-q")
    assert code == 0, err
    method = AutoConfig.from_pretrained(tmp_path / "m").method
    assert method["polish"]["kind"] == method["polished"]["kind"] == kind
    assert method["combine"] == (rule or "average")
    recipe = load_recipe(tmp_path / "m" / "recipe.yaml")
    assert recipe.config("identity", 1.0).polish == PolishConfig(kind=kind)


def test_an_anchor_is_named(call: Any, vits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    init = RootConfig.__init__.__wrapped__  # type: ignore[attr-defined]
    monkeypatch.setattr(init, "__kwdefaults__", {**init.__kwdefaults__, "steps": 2, "evaluate_every": 1})
    arguments = [vits / "low", vits / "high", "-c", "sklearn-digits", "--samples", 8, "-m", "identity", "--no-refit"]
    code, _, err = call("merge", *arguments, "--combine", "ties", "--root", "high", "-o", tmp_path / "m", "-q")
    assert code == 0, err
    method = AutoConfig.from_pretrained(tmp_path / "m").method
    assert method["rooted"]["anchor"] == "high" and method["combine"] == "ties"
    assert load_recipe(tmp_path / "m" / "recipe.yaml").config("identity", 1.0).root == RootConfig(anchor="high")


def test_what_a_kind_needs_is_said_before_any_work(call: Any, vits: Path, tmp_path: Path):
    arguments = [vits / "low", vits / "high", "-c", "sklearn-digits", "-m", "identity", "-o", tmp_path / "m"]
    for given, told in (
        (["--polish", "adamergin"], "did you mean 'adamerging'"),
        (["--polish", "adamerging", "--no-refit"], "choose a rule that reads a base"),
        (["--combine", "tise"], "did you mean 'ties'"),
        (["--combine", "ties"], "base"),
    ):
        code, out, err = call("merge", *arguments, *given)
        assert (code, out) == (1, "") and told in err.splitlines()[-1]
        assert "measuring" not in err and not (tmp_path / "m").exists()
