"""What stands beside the weights of a merged model, and how all of it reaches the Hub.

`trust_remote_code=True`: `transformers` copies the files that `auto_map` names, flat, so a package cannot be copied;
two lines that import it can. Where hf_zipit is not installed, `transformers` says so from the import line.

Pushing is saving into a temporary folder and one commit of that folder: a repo is at every moment what it was or
complete, whatever breaks in between. (`PreTrainedModel.push_to_hub` would write a card of its own over ours.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import filter_repo_objects
from transformers import PreTrainedModel

from ..errors import OutputError
from ..files.known import belongs, leads_out
from ..hub.cards import CARD, kept_above
from ..hub.reasons import why
from ..registry import Registry

REMOTE_MODULE = "modeling_hf_zipit"

STALE = ("model*.safetensors*", "processors/*")
"""What an earlier push may have left that no longer belongs to the model: other shards, processors per task."""

Companion = Callable[[Path, PreTrainedModel, str, str | None, Sequence[str]], Any]
"""Writes files beside the weights, given the folder, the model, its name, its repo id if known, and tags."""

COMPANIONS: Registry[Companion] = Registry("companion", "hf_zipit.report", "hf_zipit.companions")
"""Called whenever a merged model is saved: the card."""


def companion(name: str) -> Callable[[Companion], Companion]:
    """Have what is decorated called whenever a merged model is saved."""
    return partial(COMPANIONS.add, name)


def auto_map(auto_class: str, model_class: str) -> dict[str, str]:
    """`config.auto_map` of a merged model; `auto_class` is the Auto class that its own class belongs to."""
    classes = {"AutoConfig": "ZipItConfig", "AutoModel": "ZipItModel", auto_class: model_class}
    return {auto: f"{REMOTE_MODULE}.{name}" for auto, name in classes.items()}


def write_remote_module(folder: str | Path, model_class: str) -> None:
    """Write `modeling_hf_zipit.py` beside the weights."""
    names = sorted({"ZipItConfig", "ZipItModel", model_class})
    text = (
        f'"""Loads this merged model with the hf_zipit package."""\nfrom hf_zipit.modeling import {", ".join(names)}\n'
    )
    Path(folder, f"{REMOTE_MODULE}.py").write_text(text, encoding="utf-8")


def open_repo(repo_id: str, *, private: bool | None = None, token: bool | str | None = None) -> str:
    """The whole id, `user/name`, of a model repo, which is made where there is none.

    Args:
        repo_id: `user/name`, or `name` for the one who is logged in.
        private: whether a new repo is private.
        token: to log in with; the stored one by default.

    Raises:
        OutputError: if the Hub cannot be reached or refuses.
    """
    with _told(repo_id):
        return _api(token).create_repo(repo_id, private=private, exist_ok=True).repo_id


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    replaced: Mapping[str, bytes] | None = None,
) -> CommitInfo:
    """Upload a saved model into a repo in one commit: the files that belong to it, whatever else is in the folder.

    What somebody wrote into the repo's card stays above ours: see `hub.cards`.

    Args:
        folder: of a saved merged model.
        repo_id, token: of an existing repo: see `open_repo`.
        revision: the branch, which is made where there is none.
        create_pr: whether to open a pull request instead of writing to the branch.
        commit_message, commit_description: of the commit.
        replaced: contents of files by name that are uploaded instead of the folder's.

    Raises:
        OutputError: if a file is a link out of the folder, or the Hub cannot be reached or refuses; the repo is then
            as it was.
    """
    folder, api = Path(folder), _api(token)
    paths = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [name for name in paths if belongs(name)]
    if out := next((name for name in names if leads_out(folder / name, folder)), None):
        raise OutputError(
            f"{folder / out} is a link that leads out of the folder, so it is not pushed; put the file there."
        )
    files = {name: str(folder / name) for name in names} | dict(replaced or {})
    with _told(repo_id, revision):
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        there = api.list_repo_files(repo_id, revision=revision)
        if CARD in there and CARD in files:
            earlier = Path(api.hf_hub_download(repo_id, CARD, revision=revision)).read_text(encoding="utf-8")
            given = files[CARD] if isinstance(files[CARD], bytes) else Path(files[CARD]).read_bytes()
            files[CARD] = kept_above(given.decode(), earlier).encode()
        stale = [name for name in filter_repo_objects(there, allow_patterns=list(STALE)) if name not in files]
        changes = [CommitOperationDelete(name) for name in stale]
        changes += [CommitOperationAdd(name, content) for name, content in files.items()]
        return api.create_commit(
            repo_id, changes, revision=revision, create_pr=create_pr,
            commit_message=commit_message or "Upload merged model", commit_description=commit_description,
        )  # fmt: skip


def _api(token: bool | str | None) -> HfApi:
    return HfApi(token=token, library_name="hf_zipit")


@contextmanager
def _told(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """A failure of the Hub or the network as one sentence."""
    try:
        yield
    except (HTTPError, OSError, ValueError, RuntimeError) as error:  # RuntimeError: the upload of one file failed
        raise OutputError(f"The model could not be pushed to {repo_id}: {why(error, repo_id, revision)}.") from error
