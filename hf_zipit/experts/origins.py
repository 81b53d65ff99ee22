"""Where the experts came from: what a recipe and a model card must say so that a merge can be made and checked again.

An expert's `sha256` is taken over the names, dtypes, shapes and bytes of its parameters and persistent buffers as they
were merged (`experts.fingerprint`), not over a file: it is the same for one file and for shards, for a model that was
loaded and for one that was built.

Invariants: nothing here uses the network; cards of repos are read from what loading left on this machine.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import yaml
from huggingface_hub.repocard import metadata_load
from torch import nn
from transformers.utils import logging

from hf_zipit.experts.fingerprint import fingerprint_experts
from hf_zipit.files.known import leads_out
from hf_zipit.hub.cache import commit_of, local_folder
from hf_zipit.hub.reasons import first_line
from hf_zipit.schema import Plain

logger = logging.get_logger(__name__)

PACKAGES = ("hf-zipit", "torch", "transformers", "accelerate", "huggingface-hub", "safetensors", "numpy", "scipy")

CARD = "README.md"

LICENCE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Origin(Plain):
    """Where one expert came from.

    Attributes:
        model: its repo id or folder; None for a model that was built in memory.
        task: of a merged model, the task whose expert this was.
        revision: the commit of the repo.
        sha256: of its weights.
        licence: `license`, and for others than the known ones `license_name` and `license_link`, from its card.
        datasets: data sets of the Hub that its card names.
        subfolder: where in the repo it is, if not at the top.
    """

    model: str | None
    task: str | None
    revision: str | None
    sha256: str
    licence: Mapping[str, str]
    datasets: tuple[str, ...]
    subfolder: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain values; what is not known is left out."""
        return {key: value for key, value in super().to_dict().items() if value}


def origins(experts: Mapping[str, nn.Module]) -> dict[str, Origin]:
    """The origins of loaded experts, by task."""
    given = {task: getattr(model, "known_sha256", None) for task, model in experts.items()}  # where it was changed
    prints = {**given, **fingerprint_experts({task: experts[task] for task, known in given.items() if known is None})}
    return {task: origin(model, prints[task]) for task, model in experts.items()}


def origin(model: nn.Module, sha256: str) -> Origin:
    name, revision, inner = getattr(model, "known_origin", None) or (*source_of(model), None)
    card = card_data(name, revision)
    licence = {key: card[key] for key in LICENCE_KEYS if _plain_text(card.get(key))}
    datasets = card.get("datasets") or []
    datasets = datasets if isinstance(datasets, list) else [datasets]
    odd = [key for key in LICENCE_KEYS if card.get(key) is not None and key not in licence]
    if odd or not all(map(_plain_text, datasets)):
        logger.warning("Metadata in the card of %s (%s) is odd and left out.", name, ", ".join(odd or ["datasets"]))
    task = getattr(model, "merged_task", None)
    return Origin(name, task, revision, sha256, licence, tuple(filter(_plain_text, datasets)), inner)


def source_of(model: nn.Module) -> tuple[str | None, str | None]:
    """The repo id or folder that a model was loaded from, and the repo's commit; None where there is none."""
    name = getattr(model, "name_or_path", "") or None
    return name, getattr(getattr(model, "config", None), "_commit_hash", None) or commit_of(name)


def card_data(source: str | None, revision: str | None = None) -> dict[str, Any]:
    """The metadata of a model's card, as far as the card is on this machine; empty if it is not, or is damaged."""
    folder = local_folder(source, revision)
    if folder is None or not (folder / CARD).is_file() or leads_out(folder / CARD, folder):
        return {}
    try:
        found = metadata_load(folder / CARD) or {}
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        logger.warning("The metadata in the card of %s is left out, it cannot be read: %s", source, first_line(error))
        return {}
    return found if isinstance(found, dict) else {}


def _plain_text(value: Any) -> bool:
    """Whether it is a short text in one line, as licences and names of data sets are."""
    return isinstance(value, str) and 0 < len(value) <= 200 and value.isprintable()


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that a merge depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a source tree that was not installed
            continue
    return found
