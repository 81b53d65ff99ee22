"""Image processors, tokenizers and processors as what they are on disk: a few files beside a model.

A merged model is saved with its experts' processor: at the top of the folder where all experts have the same, else one
per task in `processors/TASK/`. They are compared and copied as files, so nothing has to be installed to read them, and
a folder without any never yields an empty tokenizer (`AutoTokenizer` makes one from the configuration alone).

Invariants: the network is only used for a repo id that the user named.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hf_zipit.errors import ExpertError
from hf_zipit.files.known import PROCESSOR_FILES, is_processor_file, leads_out
from hf_zipit.files.known import PROCESSORS as FOLDER
from hf_zipit.hub.cache import local_folder

Files = dict[str, bytes]
"""Contents by path, relative to the model's folder."""

NOISE = ("is_local", "local_files_only", "name_or_path", "_name_or_path", "_commit_hash", "transformers_version")
"""Keys that tell where a processor was loaded from, and by what."""


def processor_files(source: str | Path | None, revision: str | None = None, *, fetch: bool = False) -> Files:
    """The processor files of a model, those under `processors/` included; none where it has none.

    With `fetch`, files of a repo (and its card) may be downloaded; else those that are on this machine are read.
    """
    folder = local_folder(source, revision, [*PROCESSOR_FILES, f"{FOLDER}/*", "README.md"] if fetch else [])
    if folder is None:
        return {}
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.iterdir()) if is_processor_file(path)}
    inner = sorted((folder / FOLDER).glob("*/*"))
    found |= {path.relative_to(folder).as_posix(): path for path in inner if is_processor_file(path)}
    for path in found.values():
        if leads_out(path, folder):
            raise ExpertError(f"{path} is a link that leads out of its folder, so it is not read; put the file there.")
    return {name: path.read_bytes() for name, path in found.items()}


def saved_files(processor: Any) -> Files:
    """What an image processor, tokenizer or processor writes into a folder."""
    if not hasattr(processor, "save_pretrained"):  # a plain function
        return {}
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}


def together(by_task: Mapping[str, Files], folders: Mapping[str, str]) -> Files:
    """The experts' processor files as those of one model: those of one if all are equal, else each in its folder.

    The folders are `processors/FOLDER/`, FOLDER by task in `folders`. Experts without any files do not count.
    """
    known = {task: files for task, files in by_task.items() if files}
    if not known:
        return {}
    first = next(iter(known.values()))
    if all(same(first, files) for files in known.values()):
        return dict(first)
    return {
        f"{FOLDER}/{folders[task]}/{name}": content for task, files in known.items() for name, content in files.items()
    }


def own_files(files: Files, folder: str) -> Files:
    """One task's files of a merged model that has them per task; else all."""
    start = f"{FOLDER}/{folder}/"
    own = {name.removeprefix(start): content for name, content in files.items() if name.startswith(start)}
    return own or {name: content for name, content in files.items() if not name.startswith(f"{FOLDER}/")}


def same(left: Files, right: Files) -> bool:
    """Whether two processors do the same: equal files, but for where they were loaded from."""
    return left.keys() == right.keys() and all(_content(n, left[n]) == _content(n, right[n]) for n in left)


def _content(name: str, raw: bytes) -> Any:
    if not name.endswith("_config.json"):
        return raw
    try:
        return json.loads(raw, object_hook=lambda found: {key: found[key] for key in found if key not in NOISE})
    except ValueError:  # damaged
        return raw


def write_files(folder: str | Path, files: Files) -> None:
    """Write the files into an existing folder."""
    for name, content in files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def load_processor(source: str | Path | None, task: str | None = None, revision: str | None = None) -> Any:
    """The processor, image processor or tokenizer that was saved with a model; None if there is none.

    `task` is the module name of a task of a merged model whose tasks have processors of their own.
    """
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    files = processor_files(source, revision, fetch=True)
    if not files:  # without this, a tokenizer would be made of a configuration alone
        return None
    own = f"{FOLDER}/{task}"
    where = {"subfolder": own} if any(name.startswith(f"{own}/") for name in files) else {}
    for auto in (AutoProcessor, AutoImageProcessor, AutoTokenizer):
        try:
            return auto.from_pretrained(source, revision=revision, trust_remote_code=False, **where)
        except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError):  # each family in its own way
            continue
    return None


@dataclass(frozen=True, eq=False)
class OwnProcessor:
    """The processor that belongs to a model, loaded when something is to be prepared.

    Attributes:
        model: an expert or a merged model.
        task: of a merged model, as a module name.
    """

    model: Any
    task: str | None = None

    @cached_property
    def loaded(self) -> Any:
        """The processor; None where the model has none."""
        files = getattr(self.model, "known_processor_files", None)
        if files:  # a merged model that was not saved yet
            with tempfile.TemporaryDirectory() as room:
                write_files(room, files)
                return load_processor(room, self.task)
        commit = getattr(getattr(self.model, "config", None), "_commit_hash", None)
        return load_processor(getattr(self.model, "name_or_path", None), self.task, commit)
