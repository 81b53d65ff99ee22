"""What is pushed from one process is loaded by another as the same model; what breaks on the way leaves nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from hf_zipit.hub.processors import same
from hf_zipit.running.saved import load_merged

from .card_rules import problems
from .conftest import Client, fresh, images
from .server import Hub

PUSH = """
from hf_zipit.running.saved import load_merged
info = load_merged(folder).push_to_hub(repo, **settings)
result = {"commit": info.oid, "pr": info.pr_url}
"""

LOADS = "from hf_zipit.running.saved import load_merged; load_merged(repo); result = True"

LOAD = """
import sys, torch, transformers
repo = sys.argv[1]
model = transformers.AutoModelForImageClassification.from_pretrained(repo, trust_remote_code=True)
x = torch.load("x.pt", weights_only=True)
with torch.no_grad():
    torch.save([model(pixel_values=x, task=task).logits for task in (None, *model.config.tasks)], "y.pt")
processor = transformers.AutoImageProcessor.from_pretrained(repo)
from hf_zipit.hub.cache import commit_of
print(commit_of(repo), type(model).__name__, processor.size["height"])
"""


def push(client: Client, folder: Path, repo: str = "me/both", **settings: Any) -> dict[str, Any]:
    return client(PUSH, folder=folder, repo=repo, settings=settings)


@torch.no_grad()
def test_a_fresh_process_loads_what_another_pushed(hub: Hub, client: Client, merged_folder: Path, tmp_path: Path):
    pushed = push(client, merged_folder, private=True)["result"]
    repo = hub.repos["me/both"]
    assert repo.private and repo.branches["main"] == pushed["commit"]
    assert len(repo.commits) == 2  # the empty one and ours
    x = images(3, seed=1)
    torch.save(x, tmp_path / "x.pt")
    done = fresh(hub, tmp_path, LOAD, "me/both")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [pushed["commit"], "ZipItForImageClassification", "8"]
    model = load_merged(str(merged_folder))
    for task, found in zip((None, *model.config.tasks), torch.load(tmp_path / "y.pt", weights_only=True), strict=True):
        assert torch.equal(found, model(pixel_values=x, task=task).logits)


def test_everything_that_belongs_to_the_model_arrives(
    hub: Hub, client: Client, merged_folder: Path, experts: dict[str, Path]
):
    push(client, merged_folder, tags=["mine"])
    files = hub.repos["me/both"].files
    local = {path.name: path.read_bytes() for path in merged_folder.glob("[!.]*")}
    assert set(files) == {".gitattributes", *local}
    assert {"model.safetensors", "config.json", "recipe.yaml", "README.md", "modeling_hf_zipit.py"} < set(files)
    assert files["model.safetensors"] == local["model.safetensors"]
    name = "preprocessor_config.json"
    assert same({name: files[name]}, {name: (experts["shoes"] / name).read_bytes()})
    card = files["README.md"].decode()
    assert not problems(card)
    assert "mine" in ModelCard(card).data.tags
    assert 'from_pretrained("me/both")' in card
    assert "POST /api/validate-yaml" in hub.calls
    recipe = yaml.safe_load(files["recipe.yaml"])
    assert {task: entry["model"] for task, entry in recipe["experts"].items()} == {
        task: str(folder) for task, folder in experts.items()
    }
    assert all(len(entry["sha256"]) == 64 for entry in recipe["experts"].values())
    assert recipe["seed"] == 0 and recipe["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("broken", ["create", "preupload", "lfs-put", "commit"])
def test_an_aborted_upload_leaves_nothing_that_loads(hub: Hub, client: Client, merged_folder: Path, broken: str):
    hub.fail = {broken}
    told = push(client, merged_folder)
    assert told["kind"] == "OutputError"
    assert told["error"].startswith("The model could not be pushed to me/both: ") and "\n" not in told["error"]
    assert ("me/both" in hub.repos) == (broken != "create")
    if broken != "create":
        assert list(map(set, hub.repos["me/both"].commits.values())) == [{".gitattributes"}]
    hub.fail = set()
    assert client(LOADS, repo="me/both")["kind"] == "ExpertError"


def test_an_aborted_second_push_leaves_the_first(hub: Hub, client: Client, merged_folder: Path, tmp_path: Path):
    push(client, merged_folder)
    before = dict(hub.repos["me/both"].files)
    other = tmp_path / "other"
    shutil.copytree(merged_folder, other)
    tensors = load_file(other / "model.safetensors")
    tensors["branches.shoes.classifier.bias"] += 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    for broken in ("lfs-put", "commit"):
        hub.fail = {broken}
        assert "error" in push(client, other)
        assert hub.repos["me/both"].files == before
    hub.fail = set()
    push(client, other)
    files = hub.repos["me/both"].files
    assert files["model.safetensors"] == (other / "model.safetensors").read_bytes() != before["model.safetensors"]
    assert "weights were changed after the merge" in files["README.md"].decode()


def test_a_second_push_replaces_the_first_and_keeps_the_files_of_others(hub: Hub, client: Client, merged_folder: Path):
    push(client, merged_folder, max_shard_size="10KB")
    repo = hub.repos["me/both"]
    assert sum(name.endswith(".safetensors") for name in repo.files) > 1
    assert client(LOADS, repo="me/both") == {"result": True}
    repo.commit("main", {**repo.files, "picture.png": b"mine", "processors/old/vocab.txt": b"x"})
    push(client, merged_folder)
    assert [name for name in repo.files if "safetensors" in name] == ["model.safetensors"]
    assert repo.files["picture.png"] == b"mine"
    assert not any(name.startswith("processors/") for name in repo.files)


def test_a_branch_and_a_pull_request(hub: Hub, client: Client, merged_folder: Path):
    hub.add("me/both")
    repo = hub.repos["me/both"]
    empty = repo.branches["main"]
    push(client, merged_folder, revision="next")
    assert repo.branches["main"] == empty and "model.safetensors" in repo.commits[repo.branches["next"]]
    told = push(client, merged_folder, create_pr=True)["result"]
    assert told["pr"].endswith("/me/both/discussions/2")
    assert repo.branches["main"] == empty


def test_moments_go_along_where_they_are_given(hub: Hub, client: Client, merged_folder: Path, tmp_path: Path):
    (tmp_path / "kept.safetensors").write_bytes(b"moments")
    push(client, merged_folder, moments=str(tmp_path / "kept.safetensors"))
    assert hub.repos["me/both"].files["moments.safetensors"] == b"moments"


def test_a_member_pushes_to_an_organisation_and_others_cannot(hub: Hub, client: Client, merged_folder: Path):
    push(client, merged_folder, "lab/both", private=True)
    assert hub.repos["lab/both"].private and "model.safetensors" in hub.repos["lab/both"].files
    assert client(LOADS, repo="lab/both")["result"]
    hub.add("rivals/theirs")
    assert "a member's if rivals" in push(client, merged_folder, "rivals/theirs")["error"]
    assert len(hub.repos["rivals/theirs"].commits) == 1


OFFLINE = "from huggingface_hub import constants; constants.HF_HUB_OFFLINE = True"
ONLINE = "from huggingface_hub import constants; constants.HF_HUB_OFFLINE = False"


@pytest.mark.parametrize(
    ("repo", "settings", "reason"),
    [
        ("other/both", {}, "log in"),
        ("rivals/both", {}, "a member's if rivals is an organisation"),
        ("me/both", {"token": False}, "log in"),
        ("me/both", {"token": "hf_wrong"}, "log in"),
        ("me/both/x", {}, "not a repo id"),
    ],
)
def test_a_push_that_is_refused_is_one_sentence(hub: Hub, client: Client, merged_folder: Path, repo, settings, reason):
    told = push(client, merged_folder, repo, **settings)
    assert told["kind"] == "OutputError"
    assert reason in told["error"] and repo in told["error"] and "\n" not in told["error"]
    assert not hub.repos


def test_a_push_without_a_network_is_one_sentence(hub: Hub, client: Client, merged_folder: Path):
    client(OFFLINE)
    told = push(client, merged_folder)
    client(ONLINE)
    assert "HF_HUB_OFFLINE is set" in told["error"]
    hub.fail = {"everything"}
    assert "does not answer" in push(client, merged_folder)["error"]


def test_a_saved_folder_is_pushed_as_it_is(hub: Hub, client: Client, merged_folder: Path, tmp_path: Path):
    folder = tmp_path / "both"
    shutil.copytree(merged_folder, folder)
    card = (folder / "README.md").read_text() + "\nWritten by hand.\n"
    (folder / "README.md").write_text(card)
    (folder / "checkpoint-1").mkdir()
    for name in (".hidden", "checkpoint-1/model.safetensors", "optimizer.pt"):
        (folder / name).write_text("not for the Hub")
    code = "from hf_zipit.running.saved import push_saved\n"
    code += "result = str(push_saved(folder, 'both', private=True).repo_url)"
    assert client(code, folder=folder)["result"] == f"{hub.endpoint}/me/both"
    files = hub.repos["me/both"].files
    pushed = files["README.md"].decode()
    assert "Written by hand." in pushed and 'from_pretrained("me/both")' in pushed
    assert set(files) == {".gitattributes", *(path.name for path in merged_folder.glob("[!.]*"))}
    assert client(code, folder=tmp_path / "none")["kind"] == "ExpertError"


MISSING = """
import sys, importlib.abc
class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_zipit":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
import transformers
transformers.AutoModelForImageClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
"""


def test_where_hf_zipit_is_missing_it_says_how_to_install_it(hub: Hub, merged_folder: Path, tmp_path: Path):
    hub.add_folder("me/both", merged_folder)
    done = fresh(hub, tmp_path, MISSING, "me/both")
    assert done.returncode != 0
    assert "pip install hf_zipit" in done.stderr.splitlines()[-1]


def test_what_a_person_wrote_into_the_repos_card_stays_above_ours(hub: Hub, client: Client, merged_folder: Path):
    hub.add("me/both")
    repo = hub.repos["me/both"]
    repo.commit("main", {"README.md": b"---\nlicense: mit\n---\n# Mine\n\nBy hand.\n"})
    for _ in range(2):
        push(client, merged_folder)
        card = repo.files["README.md"].decode()
        assert not problems(card) and card.count("By hand.") == 1
        assert card.index("# Mine") < card.index("<!-- What stands above") < card.index("# both")
        assert ModelCard(card).data.license == "apache-2.0"
