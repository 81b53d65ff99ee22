"""Merged models that are saved already, in a folder or on the Hub: load one, push one, write its card again."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from transformers import PreTrainedModel

from hf_zipit import modeling
from hf_zipit.errors import ExpertError, OutputError
from hf_zipit.experts.checkpoints import class_of, read_config, read_weights
from hf_zipit.files import recover
from hf_zipit.files.places import folder_of
from hf_zipit.files.tensors import damage
from hf_zipit.hub.cards import CARD
from hf_zipit.hub.reasons import told
from hf_zipit.modeling import ZipItConfig
from hf_zipit.modeling.hub import open_repo, push_folder
from hf_zipit.recipe.loading import load_recipe
from hf_zipit.report.card import text_for_repo, write_card


def load_merged(source: str, revision: str | None = None) -> PreTrainedModel:
    """A merged model from a repo id or folder, with the class that its configuration names.

    Raises ExpertError if it cannot be loaded, or is not a merged model.
    """
    with told(f"The merged model {source} cannot be loaded", source, revision):
        if (folder := folder_of(source)) is not None:
            recover(folder)
            source = str(folder)
        config = read_config(source, revision)
        if not isinstance(config, modeling.ZipItConfig):
            raise ExpertError(
                f"{source} holds a model of type {config.model_type!r}, not a merged model; merge some first."
            )
        model_class = class_of(config, f"the configuration of {source}", modeling)
        model, found = read_weights(model_class, source, config, revision)
        if wrong := damage(found):
            raise ExpertError(f"The merged model {source} is damaged: it {wrong}; save it again, or merge again.")
        return model.eval()


def push_saved(source: str | Path, repo_id: str, *, private: bool | None = None, **settings: Any) -> CommitInfo:
    """Push a saved merged model as it is, files that were added to it included.

    Args:
        source: its folder, or the recipe whose results are in the recipe's folder.
        repo_id, private, settings: see `hf_zipit.modeling.hub.open_repo` and `push_folder`, which also raise.

    Raises:
        ExpertError: if there is no merged model.
    """
    folder = Path(source).expanduser()
    if folder.is_file():
        folder = load_recipe(folder).folder / "model"
        if not (folder / "config.json").is_file():
            raise ExpertError(
                f"The recipe {source} has no model in {folder} yet; run it first: hf-zipit run {source}."
            )
    if not (folder / "config.json").is_file():
        raise ExpertError(f"There is no merged model in {source}; name the folder of one, or a recipe.")
    if json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type") != ZipItConfig.model_type:
        raise ExpertError(f"{source} holds a model that is not a merged one; push it with its own push_to_hub.")
    repo_id = open_repo(repo_id, private=private, token=settings.get("token"))
    card = folder / CARD
    text = text_for_repo(card.read_text(encoding="utf-8"), repo_id) if card.is_file() else None
    return push_folder(folder, repo_id, replaced={CARD: text.encode()} if text else None, **settings)


def card_of(source: str, *, write: bool = False) -> tuple[str, Path | None]:
    """The model card of a merged model in a folder or repo, and where it was written.

    With `write` it is written, with its pictures and the recipe, into the folder. Raises an ExpertError if the model
    cannot be loaded or is not a merged one, an OutputError if there is no folder to write into.
    """
    folder = Path(source).expanduser()
    if write and not folder.is_dir():
        raise OutputError(f"{source} is not a folder, so no card can be written there; leave --write out to print it.")
    model = load_merged(str(folder) if folder.is_dir() else source)
    repo_id = None if folder.is_dir() else source
    with tempfile.TemporaryDirectory() as room:
        path = write_card(folder if write else Path(room), model, folder.absolute().name, repo_id)
        return path.read_text(encoding="utf-8"), path if write else None
