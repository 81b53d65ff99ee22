"""A model's files in a folder that may hold other things: all of them replaced at once, in place.

A model is several files, and no file system replaces several at once; replacing the whole folder would move what else
is in it, and cannot be done for a mount point or under somebody's feet. So, as in SQLite:

1. The new files are written into a hidden folder in the folder, and brought to disk.
2. A journal that lists them is written there. From here on the new model is what the folder will hold.
3. The files are put into their places. First `config.json`, with `transformers_weights` pointing to the new weights in
   the hidden folder: this one rename is when everybody who reads the folder gets the new model for the old one. Then
   the others; stale files go; last the final `config.json`.
4. Journal and hidden folder are removed.

Invariants: killed before 2, the folder is as it was, and the next writer removes the hidden folder; killed later, the
next writer, or hf_zipit reading the folder, goes through 3 again, which changes nothing that is done already. At every
moment between, configuration and weights belong together. Files that this library did not write are never touched.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hf_zipit.errors import OutputError
from hf_zipit.files.atomic import empty, publish, room, to_disk, told
from hf_zipit.files.known import CONFIG, MANIFEST, belongs, is_ours, manifest, model_type, written_files

ROOM = ".hf_zipit"
NEW, JOURNAL, NEXT = "new", "journal.json", "next"

POINTER = "transformers_weights"
"""The key of a configuration that names the file with the weights."""

INDEX = ".safetensors.index.json"


@contextmanager
def adding_to(folder: str | Path) -> Iterator[Path]:
    """A new folder to be filled; its files take their places in `folder` when the block ends without an error.

    Files there that an earlier model of ours has and the new one has not are removed; all others stay. Permissions of
    files that are replaced stay as well. Raises OutputError as `replacing` and `check_not_foreign` do, or if the
    folder has a link where a folder of the new model goes.
    """
    folder = Path(folder)
    with told(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with room(folder / ROOM, folder) as place:
            _finish(folder, place)
            new = place / NEW
            try:
                check_not_foreign(folder)
                new.mkdir()
                yield new
                _commit(folder, place)
            finally:
                if not (place / JOURNAL).exists():
                    shutil.rmtree(place, ignore_errors=True)
            _finish(folder, place)
            shutil.rmtree(place)


def recover(folder: str | Path) -> None:
    """Finish what a killed writer left half done in a folder; nothing where another one is at it, or we may not."""
    folder = Path(folder)
    if (folder / ROOM).is_dir():
        with suppress(OSError, OutputError), room(folder / ROOM, folder, wait=0) as place:
            _finish(folder, place)
            shutil.rmtree(place)


def check_not_foreign(folder: Path) -> None:
    """Raises OutputError if a folder holds a model that this library did not write."""
    if (folder / CONFIG).exists() and not is_ours(folder):
        kind = model_type(folder)
        raise OutputError(
            f"The folder {folder} holds a model{f' of type {kind!r}' if kind else ''} that hf_zipit did not write; "
            "name another folder, or move that model away."
        )


def _commit(folder: Path, place: Path) -> None:
    """Bring the new files to disk, and the journal that lists them."""
    new = place / NEW
    files = sorted(path.relative_to(new).as_posix() for path in new.rglob("*") if path.is_file())
    old = written_files(folder) if is_ours(folder) else []
    for name in files:
        if (folder / name).is_dir() or _behindlink(folder, name):
            raise OutputError(
                f"{folder / name} is a folder or behind a link, where a file of the model goes; move it."
            )
    if CONFIG in files:
        (new / MANIFEST).write_text(json.dumps(manifest(new, files), indent=2) + "\n", encoding="utf-8")
        files.append(MANIFEST)
    for name in files:
        if (folder / name).is_file():
            shutil.copymode(folder / name, new / name)
        to_disk(new / name)
    for path in (*(path for path in new.rglob("*") if path.is_dir()), new):
        to_disk(path)
    journal = {"files": files, "stale": [name for name in old if name not in files]}
    (place / NEXT).write_text(json.dumps(journal), encoding="utf-8")
    publish(place / NEXT, place / JOURNAL)


def _finish(folder: Path, place: Path) -> None:
    """Do what the journal says, if there is one, and leave the hidden folder empty."""
    if journal := _journal(place):
        _put(folder, place, *journal)
        (place / JOURNAL).unlink()
        to_disk(place)
    empty(place)


def _journal(place: Path) -> tuple[list[str], list[str]] | None:
    """The files to put in place and those to remove; None without a journal, or if it is not one that we wrote.

    A folder may come from somewhere else: what it says must not lead out of it.
    """
    try:
        found = json.loads((place / JOURNAL).read_text(encoding="utf-8"))
        files, stale = ([name for name in found[key] if isinstance(name, str)] for key in ("files", "stale"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    root = place.resolve() / NEW
    for name in files:
        path = (root / name).resolve()
        if path != root / name or root not in path.parents or not path.is_file() or _behindlink(place.parent, name):
            return None
    return files, [name for name in stale if belongs(name)]


def _put(folder: Path, place: Path, files: list[str], stale: list[str]) -> None:
    """The staged files in their places, as links: until all is done they are in the hidden folder, too."""
    weights = _weights(files)
    if CONFIG in files and weights and (folder / CONFIG).exists():
        _point(folder, place, weights)
    for name in sorted(files, key=lambda name: name == CONFIG):
        if name == CONFIG:
            for gone in stale:
                _remove(folder, gone)
            to_disk(folder)
        link(place / NEW / name, place / NEXT)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(place / NEXT, folder / name)
        (place / NEXT).unlink(missing_ok=True)  # renaming a link over another one of the same file does nothing
    to_disk(folder)


def _weights(files: list[str]) -> str | None:
    """The file by which weights are found: the index of shards, else the only one."""
    names = [name for name in files if name.startswith("model") and "/" not in name]
    ends = (INDEX, ".safetensors")
    return next((name for end in ends for name in names if name.endswith(end)), None)


def _point(folder: Path, place: Path, weights: str) -> None:
    """Have `config.json` be the new one, with its weights where they are now."""
    new = place / NEW
    target = f"{ROOM}/{NEW}/{weights}"
    if weights.endswith(INDEX):  # the names of shards are relative to the folder
        index = json.loads((new / weights).read_text(encoding="utf-8"))
        index["weight_map"] = {name: f"{ROOM}/{NEW}/{shard}" for name, shard in index["weight_map"].items()}
        target = f"{ROOM}/next{INDEX}"
        _write(folder / target, index)
    config = json.loads((new / CONFIG).read_text(encoding="utf-8"))
    _write(place / NEXT, {**config, POINTER: target})
    publish(place / NEXT, folder / CONFIG)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.unlink(missing_ok=True)  # a killed writer may have left a link to a new file here, which must not be written
    path.write_text(json.dumps(content), encoding="utf-8")
    to_disk(path)


def link(source: Path, target: Path) -> None:
    """Have a file under another name, too, in place of what is there: as a link, or copied where there are none."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)
        to_disk(target)


def _remove(folder: Path, name: str) -> None:
    """Remove a file, and the folders that are empty then; nothing behind a link."""
    if _behindlink(folder, name):
        return
    (folder / name).unlink(missing_ok=True)
    for part in Path(name).parents:
        if part != Path("."):
            with suppress(OSError):  # holds something else
                (folder / part).rmdir()


def _behindlink(folder: Path, name: str) -> bool:
    """Whether a link stands between a folder, which may be one itself, and a file in it."""
    return any((folder / part).is_symlink() for part in Path(name).parents if part != Path("."))
