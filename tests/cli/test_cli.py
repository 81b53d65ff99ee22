"""The command line: results on stdout, progress on stderr, one red sentence for bad input."""

from __future__ import annotations

import json
import logging

import huggingface_hub
import pytest
import torch

import hf_zipit
from hf_zipit.cli.app import EXIT_CODES
from hf_zipit.cli.commands import app
from hf_zipit.cli.options import parse_columns, parse_experts
from hf_zipit.cli.printing import working
from hf_zipit.errors import RecipeError

COMMANDS = sorted(app.group.commands)


def test_help_names_every_command(call):
    code, out, _ = call("--help")
    assert code == 0
    assert all(f"  {name} " in out for name in COMMANDS)
    assert "  $ hf-zipit doctor" in out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_it_does(call, name):
    code, out, err = call(name, "--help")
    usage, _, text = out.partition("\n\n")
    assert code == 0 and not err
    assert usage.startswith(f"Usage: hf-zipit {name} ")
    first = text.splitlines()[0].strip()
    assert first.endswith(".") and len(first) < 60
    prints = name != "app"  # which serves a page
    assert ("--json" in out) == ("--format [table|json]" in out) == prints
    assert "Examples\n" in out and f"$ hf-zipit {name}" in out
    for parameter in app.group.commands[name].params:
        assert parameter.help and parameter.help.endswith((".", "...", "?")), parameter.name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rum"], "Did you mean 'run'"),
        (["run", "a.yaml", "--nope"], "No such option '--nope'"),
        (["merge", "a", "b"], "Missing option '--out'"),
        (["evaluate", "a"], "Missing option '--dataset'"),
        (["doctor", "--format", "xml"], "'xml' is not one of"),
        (["merge", "a", "b", "--out", "m", "--samples", "0"], "0 is not in the range"),
        (["merge", "a", "b", "--out", "m", "--seed", "-5"], "-5 is not in the range"),
    ],
)
def test_a_wrong_use_ends_with_two(call, arguments, message):
    code, out, err = call(*arguments)
    assert code == 2
    assert message in err and not out


def test_a_command_without_its_arguments_prints_its_help_and_is_a_wrong_use(call):
    code, out, err = call("run")
    assert code == 2 and not out
    assert err.startswith("Usage: hf-zipit run [OPTIONS] RECIPE")
    assert call("doctor")[0] in (0, 1)  # it takes none


def test_the_version_and_the_exit_codes_are_told(call):
    code, out, _ = call("--version")
    assert code == 0 and out.split() == ["hf-zipit", hf_zipit.__version__]
    _, out, _ = call("--help")
    assert all(f"  {code:<5} {meaning}" in out for code, meaning in EXIT_CODES.items())
    assert [line for line in out.splitlines() if line.endswith(" commands:")] == [
        "Main commands:", "Exploring commands:", "Looking commands:", "Publishing commands:",
    ]  # fmt: skip


@pytest.mark.parametrize("flags", [["--json"], ["--format", "json"], ["--format=json"]])
def test_json_has_two_spellings(call, flags):
    _, out, _ = call("doctor", *flags)
    assert json.loads(out)[0]["what"] == "hf-zipit"


def error(answer: tuple[int, str, str]) -> str:
    """The one sentence of an answer that must be an error."""
    code, out, err = answer
    assert code == 1
    assert out == ""
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1
    return lines[0]


def test_bad_input_is_one_sentence(call, tmp_path, vits):
    assert "There is no recipe" in error(call("run", tmp_path / "none.yaml"))
    assert "does not exist" in error(call("inspect", tmp_path / "none"))
    assert "at least two" in error(call("merge", vits / "low", "--out", tmp_path / "m"))
    assert "calibration is missing" in error(
        call("merge", vits / "low", vits / "high", "-m", "zip", "--out", tmp_path / "m")
    )
    two = (vits / "low", vits / "high", "-c", "sklearn-digits", "--out", tmp_path / "m")
    assert "did you mean 'zip'" in error(call("merge", *two, "-m", "zpi"))
    assert "from 0 to 1" in error(call("merge", *two, "-d", "2"))
    assert "is no block" in error(call("merge", *two, "-d", "vit.layers.7"))
    assert "did you mean 'tall'" in error(call("merge", *two, "--residues", "talls"))
    assert "above 1" in error(call("merge", *two, "--residues", "0.9"))
    assert "not a merged model" in error(call("evaluate", vits / "low", "--dataset", "sklearn-digits"))
    assert "did you mean 'sklearn-digits'" in error(call("evaluate", vits / "low", "--dataset", "sklearn-digit"))
    assert "OLD=NEW" in error(call("evaluate", vits / "low", "--dataset", "sklearn-digits", "--column", "a"))
    assert "--samples" in error(call("evaluate", vits / "low", "--dataset", "sklearn-digits", "--streaming"))
    assert not (tmp_path / "m").exists()


def test_inspect_prints_the_spaces_and_the_proof(call, vits):
    code, out, err = call("inspect", vits / "low", "--json")
    assert code == 0
    assert "proving" in err
    found = json.loads(out)
    assert found["proof"]["holds"] and found["proof"]["error"] <= 1e-5
    spaces = {space["name"]: space for space in found["spaces"]}
    heads = [space for name, space in spaces.items() if name.endswith("heads")]
    assert [space["size"] for space in heads] == [2, 2]
    assert {space["heads"] for space in spaces.values() if space["within"]} == {2}
    assert any(space["symmetry"] == "fixed" and space["frozen_by"] for space in spaces.values())
    _, table, _ = call("inspect", vits / "low")
    assert "proven" in table and all(name in table for name in spaces)


def test_merge_then_evaluate(call, vits, tmp_path):
    experts = (f"small={vits / 'low'}", f"large={vits / 'high'}")
    out_folder = tmp_path / "merged"
    arguments = (*experts, "-c", "sklearn-digits", "--samples", 24, "--depth", 0.5, "--out", out_folder, "--json")
    code, out, _ = call("merge", *arguments)
    assert code == 0
    merged = json.loads(out)
    assert merged["kept"]["depth"] == 0.5
    assert merged["model"] == str(out_folder)
    assert {"config.json", "model.safetensors", "README.md", "recipe.yaml"} <= {p.name for p in out_folder.iterdir()}
    code, out, _ = call("evaluate", out_folder, "--dataset", "sklearn-digits", "--json")
    assert code == 0
    found = json.loads(out)
    assert list(found["per_task"]) == ["small", "large"]
    assert all(0 <= value <= 1 for value in found["joint_per_task"].values())
    assert found["scores"] == {}
    measuring = ("evaluate", out_folder, "--dataset", "sklearn-digits", "--metric", "f1", "--samples", 30)
    code, out, _ = call(*measuring, "--json")
    scores = json.loads(out)
    assert scores["samples"] == {"small": 30, "large": 30}
    assert all(0 <= scores["scores"][task]["f1"] <= 1 for task in ("small", "large"))
    code, out, _ = call(*measuring)
    assert code == 0 and "f1" in out and "joint" in out


def test_a_dry_run_prints_the_plan_and_writes_nothing(call, vits, tmp_path):
    arguments = ("merge", vits / "low", vits / "high", "-c", "sklearn-digits", "--out", tmp_path / "m", "--dry-run")
    code, out, _ = call(*arguments, "--json")
    assert code == 0
    (plan,) = json.loads(out)
    assert plan["tasks"] == ["low", "high"]
    assert plan["parameters"]["merged"] < plan["parameters"]["experts"]
    code, out, _ = call(*arguments)
    assert code == 0 and "at most 512 samples of each task" in out
    assert not (tmp_path / "m").exists()


def test_a_sweep_says_where_its_picture_is_and_first_whether_it_can_be_there(call, vits, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    experts = {name: {"model": str(vits / name)} for name in ("low", "high")}
    content = {"name": "digits", "experts": experts, "evaluation": {"dataset": "sklearn-digits", "samples": 4}}
    recipe.write_text(json.dumps({**content, "method": "average", "output": str(tmp_path / "out")}))
    plot = tmp_path / "depths.png"
    code, out, _ = call("sweep", recipe, "-d", "1", "-d", "0", "--plot", plot)
    assert code == 0 and out.splitlines()[-1] == f"picture  {plot}"
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "out").exists()
    code, _, err = call("sweep", recipe, "--plot", recipe / "depths.png")
    assert code == 1 and "cannot be written" in err and "merging" not in err


def test_retries_of_the_hubs_client_are_not_told():
    hub = logging.getLogger("huggingface_hub.utils._http")
    before = huggingface_hub.logging.get_verbosity()
    huggingface_hub.logging.set_verbosity_warning()
    try:
        with working(quiet=True):
            assert not hub.isEnabledFor(logging.WARNING)
    finally:
        huggingface_hub.logging.set_verbosity(before)


def test_doctor_finds_this_installation_in_order(call):
    code, out, _ = call("doctor", "--json")
    found = {check["what"]: check for check in json.loads(out)}
    assert code == (0 if all(check["good"] for check in found.values()) else 1)
    assert found["torch"]["found"] == torch.__version__
    assert all(check["remedy"] for check in found.values() if not check["good"])
    assert {"devices", "processes", "process groups", "Hub cache", "hf zipit"} <= set(found)


def test_columns_are_pairs():
    assert parse_columns(["img=image", "fine=labels"]) == {"img": "image", "fine": "labels"}
    assert parse_columns(None) == {}
    for wrong in ("img", "=image", "img="):
        with pytest.raises(RecipeError, match="should be OLD=NEW"):
            parse_columns([wrong])


def test_task_names_are_given_or_taken_from_the_path():
    assert parse_experts(["shoes=me/vit", "./out/clothes/"]) == {"shoes": "me/vit", "clothes": "./out/clothes/"}
    for wrong in (["a=x", "a=y"], ["x/a", "y/a"], ["=x"], ["a="]):
        with pytest.raises(RecipeError):
            parse_experts(wrong)
