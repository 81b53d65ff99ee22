"""Experts from the Hub: what is recorded of them, and one clear sentence for everything that can go wrong."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import ViTForImageClassification

from ..test_docs import ROOT, blocks_of, commands_of
from .card_rules import problems
from .conftest import CARD, Client
from .server import Hub
from .test_push import OFFLINE, ONLINE

ORIGIN = """
from hf_zipit.experts.origins import source_of
result = source_of(load_expert('a', source, revision))
"""

LOAD = """
from hf_zipit.experts.loading import load_expert
result = type(load_expert("clothes", source, revision)).__name__
"""

MERGE = """
import json, torch, hf_zipit
from pathlib import Path
merged = hf_zipit.merge(experts, torch.zeros(4, 3, 8, 8), method="permute")
merged.save_pretrained(out)
result = merged.config.method["experts"]
"""


def load(client: Client, source: str, revision: str | None = None) -> dict[str, Any]:
    return client(LOAD, source=source, revision=revision)


def without(folder: Path, name: str, room: Path) -> Path:
    shutil.copytree(folder, room / "copy")
    (room / "copy" / name).unlink()
    return room / "copy"


def test_where_experts_came_from_is_recorded(hub: Hub, client: Client, experts: dict[str, Path], tmp_path: Path):
    repos = {task: hub.add_folder(f"me/{task}", folder) for task, folder in experts.items()}
    found = client(MERGE, experts={task: f"me/{task}" for task in experts}, out=tmp_path / "both")["result"]
    for task, repo in repos.items():
        assert found[task]["model"] == f"me/{task}"
        assert found[task]["revision"] == repo.branches["main"]
        assert found[task]["licence"] == {"license": "apache-2.0"}
        assert len(found[task]["sha256"]) == 64
    card = (tmp_path / "both" / "README.md").read_text()
    assert not problems(card)
    data = yaml.safe_load(card.split("---")[1])
    assert data["base_model"] == ["me/clothes", "me/shoes"] and data["base_model_relation"] == "merge"
    assert data["license"] == "apache-2.0" and data["datasets"] == ["me/pictures"]
    # The image processor came along with the experts.
    assert json.loads((tmp_path / "both" / "preprocessor_config.json").read_text())["size"]["height"] == 8


def test_a_licence_is_claimed_only_where_it_follows_from_the_experts(
    hub: Hub, client: Client, experts: dict[str, Path], tmp_path: Path
):
    hub.add_folder("me/clothes", experts["clothes"])
    shoes = hub.add_folder("me/shoes", experts["shoes"])
    shoes.commit("main", {**shoes.files, "README.md": CARD.replace("apache-2.0", "llama3").encode()})
    client(MERGE, experts={task: f"me/{task}" for task in experts}, out=tmp_path / "both")
    card = (tmp_path / "both" / "README.md").read_text()
    assert "license" not in yaml.safe_load(card.split("---")[1])
    assert "Its licence is not stated" in card


def test_a_revision_is_loaded_and_pinned(hub: Hub, client: Client, experts: dict[str, Path]):
    repo = hub.add_folder("me/clothes", experts["clothes"])
    old = repo.branches["main"]
    repo.commit("main", {".gitattributes": b""})
    code = LOAD + ORIGIN
    assert client(code, source="me/clothes", revision=old)["result"] == ["me/clothes", old]
    assert "could not be loaded" in load(client, "me/clothes")["error"]


@pytest.mark.parametrize("logged_in", [True, False])
def test_gated_and_private_repos(hub: Hub, client: Client, experts: dict[str, Path], logged_in: bool):
    hub.add_folder("other/gated", experts["clothes"], gated=True)
    hub.add_folder("other/private", experts["clothes"], private=True)
    if not logged_in:
        client("import os; token = os.environ.pop('HF_TOKEN')")
    try:
        told = {kind: load(client, f"other/{kind}") for kind in ("gated", "private", "none")}
    finally:
        client("import os; os.environ['HF_TOKEN'] = 'hf_me'")
    assert all(answer["kind"] == "ExpertError" for answer in told.values())
    for kind, reason in {"gated": "is gated; ask for access", "private": "no repo", "none": "no repo"}.items():
        assert told[kind]["error"].startswith(f"the expert 'clothes' could not be loaded from other/{kind}: ")
        assert reason in told[kind]["error"] and "hf auth login" in told[kind]["error"]
        assert "\n" not in told[kind]["error"] and len(told[kind]["error"]) < 250
    hub.repos["other/gated"].readers.add("me")
    assert load(client, "other/gated") == {"result": "ViTForImageClassification"}


@pytest.mark.parametrize(
    ("name", "reason"), [("config.json", "config.json is missing"), ("model.safetensors", "model.safetensors")]
)
def test_a_repo_without_the_file(hub: Hub, client: Client, experts: dict[str, Path], tmp_path: Path, name, reason):
    hub.add_folder("me/part", without(experts["clothes"], name, tmp_path))
    told = load(client, "me/part")
    assert told["kind"] == "ExpertError" and "\n" not in told["error"]
    assert reason in told["error"] and "me/part" in told["error"]


def test_a_wrong_revision_a_damaged_file_and_no_repo_id(
    hub: Hub, client: Client, experts: dict[str, Path], tmp_path: Path
):
    repo = hub.add_folder("me/clothes", experts["clothes"])
    assert "the repo has no revision 'v2'" in load(client, "me/clothes", "v2")["error"]
    repo.commit("main", {**repo.files, "model.safetensors": b"\x08\0\0\0\0\0\0\0{broken}"})
    assert load(client, "me/clothes")["kind"] == "ExpertError"
    assert "no such folder, and it is not a repo id" in load(client, "a--b")["error"]
    assert "the folder a/b/c, which does not exist" in load(client, "a/b/c")["error"]


def test_offline(hub: Hub, client: Client, experts: dict[str, Path]):
    hub.add_folder("me/clothes", experts["clothes"])
    hub.add_folder("me/shoes", experts["shoes"])
    assert "result" in load(client, "me/clothes")
    client(OFFLINE)
    try:
        assert load(client, "me/clothes") == {"result": "ViTForImageClassification"}  # it is in the cache
        told = load(client, "me/shoes")
    finally:
        client(ONLINE)
    assert told["kind"] == "ExpertError" and "HF_HUB_OFFLINE is set" in told["error"] and "\n" not in told["error"]
    hub.fail = {"everything"}
    told = load(client, "me/shoes")
    assert told["kind"] == "ExpertError" and "does not answer" in told["error"] and "\n" not in told["error"]


def test_merging_models_in_memory_asks_the_hub_for_nothing(
    hub: Hub, client: Client, experts: dict[str, Path], tmp_path: Path
):
    for task, folder in experts.items():
        hub.add_folder(f"me/{task}", folder)
    load_them = """
import builtins
from transformers import ViTForImageClassification
builtins.kept = {task: ViTForImageClassification.from_pretrained(f"me/{task}") for task in ("clothes", "shoes")}
"""
    client(load_them)
    hub.calls.clear()
    found = client("import builtins; experts = builtins.kept\n" + MERGE, out=tmp_path / "both")["result"]
    assert not hub.calls
    assert found["shoes"]["revision"] == hub.repos["me/shoes"].branches["main"]  # the only one in the cache


def test_an_adapter_and_its_base_come_from_the_hub(hub: Hub, client: Client, experts: dict[str, Path], tmp_path: Path):
    peft = pytest.importorskip("peft")
    model = ViTForImageClassification.from_pretrained(experts["clothes"])
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"])
    peft.get_peft_model(model, settings).save_pretrained(tmp_path / "lora")
    path = tmp_path / "lora" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "me/base"}))
    repo = hub.add_folder("me/lora", tmp_path / "lora")
    told = load(client, "me/lora")
    assert "the base me/base of the expert 'clothes' could not be loaded: there is no folder and no" in told["error"]
    hub.add_folder("me/base", experts["clothes"])
    code = LOAD + ORIGIN
    assert client(code, source="me/lora", revision=None)["result"] == ["me/lora", repo.branches["main"]]


CLI = """
import sys, io, contextlib
from hf_zipit.cli import main
out, err = io.StringIO(), io.StringIO()
sys.argv = ["hf-zipit", *arguments]
with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code
result = [code, out.getvalue(), err.getvalue()]
"""


def cli(client: Client, *arguments: object) -> tuple[int, str, str]:
    code, out, err = client(CLI, arguments=list(map(str, arguments)))["result"]
    return code or 0, out, err


def test_the_command_line_pushes_and_prints_cards(hub: Hub, client: Client, merged_folder: Path, tmp_path: Path):
    code, out, err = cli(client, "push", merged_folder, "both", "--private", "--message", "first", "--quiet")
    assert (code, out.strip()) == (0, f"{hub.endpoint}/me/both"), err
    assert hub.repos["me/both"].private
    assert hub.repos["me/both"].files["model.safetensors"] == (merged_folder / "model.safetensors").read_bytes()
    code, out, _ = cli(client, "card", "me/both")
    assert code == 0 and not problems(out) and 'from_pretrained("me/both")' in out
    folder = tmp_path / "both"
    shutil.copytree(merged_folder, folder)
    (folder / "README.md").unlink()
    code, out, _ = cli(client, "card", folder, "--write")
    assert code == 0 and out.strip() == str(folder / "README.md")
    assert (folder / "README.md").read_text() == (merged_folder / "README.md").read_text()


def test_what_the_guide_says_of_pushing_works(hub: Hub, client: Client, merged_folder: Path):
    """The blocks that `test_docs.py` leaves out, to the letter, for a user who is logged in."""
    python, bash = (block for block in blocks_of(ROOT / "docs" / "guides" / "pushing.md") if block.excuse)
    client("import os, shutil; shutil.copytree(folder, 'out/merged', dirs_exist_ok=True)", folder=merged_folder)
    (push,) = (command for command in commands_of(bash.code) if command.startswith("hf-zipit"))
    load = "from hf_zipit.running.saved import load_merged\nmerged = load_merged('out/merged')\n"
    for run in (lambda: client(load + python.code), lambda: cli(client, *shlex.split(push)[1:])):
        hub.repos.clear()
        run()
        repo = hub.repos["me/vit-clothes-shoes"]
        assert repo.private
        assert repo.files["model.safetensors"] == (merged_folder / "model.safetensors").read_bytes()
        assert {"README.md", "config.json", "preprocessor_config.json"} <= set(repo.files)


def test_the_command_line_tells_errors_in_one_sentence(hub: Hub, client: Client, merged_folder: Path, tmp_path: Path):
    hub.add("other/gated", {"config.json": b"{}"}, gated=True)
    cases = [
        ("inspect", "other/gated"),
        ("inspect", "me/none"),
        ("evaluate", "me/none", "--dataset", "sklearn-digits"),
        ("push", merged_folder, "other/both"),
        ("push", tmp_path, "me/both"),
        ("card", "me/none"),
        ("card", "me/none", "--write"),
        ("merge", "a=me/none", "b=other/gated", "-c", "sklearn-digits", "--out", tmp_path / "out"),
    ]
    for case in cases:
        code, out, err = cli(client, *case)
        assert code == 1 and not out, case
        assert "Traceback" not in err
        assert len([line for line in err.splitlines() if line.startswith("Error: ")]) == 1, (case, err)


def test_a_revision_and_a_folder_in_a_repo_are_named_in_one_text(
    hub: Hub, client: Client, experts: dict[str, Path], tmp_path: Path
):
    files = {f"best/{path.name}": path.read_bytes() for path in experts["clothes"].iterdir()}
    hub.add_folder("me/runs", experts["shoes"])
    old = hub.repos["me/runs"].commit("v1", {**files, "README.md": CARD.encode()})
    sources = ["me/runs@v1/best", "me/runs"]
    found = client(MERGE, experts=sources, out=tmp_path / "both")["result"]
    assert found["best"]["model"] == "me/runs" and found["best"]["subfolder"] == "best"
    assert found["best"]["revision"] == old and found["best"]["licence"] == {"license": "apache-2.0"}
    assert found["runs"]["revision"] != old and "subfolder" not in found["runs"]
    again = yaml.safe_load((tmp_path / "both" / "recipe.yaml").read_text())
    assert again["experts"]["best"]["subfolder"] == "best"
    assert (tmp_path / "both" / "preprocessor_config.json").exists()  # that of the folder
    assert (
        "could not be loaded from me/runs@v2/best: the repo has no revision"
        in load(client, "me/runs@v2/best")["error"]
    )
