"""Writing results so that a good one is never lost: write beside, then rename.

Invariants: at every moment the target is either what it was or complete. A full disk, a missing permission or a
path that leads through a file is told in one sentence, as an `OutputError`.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_zipit.errors import OutputError


@contextmanager
def replacing(target: str | Path) -> Iterator[Path]:
    """A new path beside `target`, to be written; it takes the target's place when the block ends without an error.

    Raises OutputError if the folder cannot be written, or the disk is full.
    """
    target = Path(target)
    with _room_for(target, target.parent) as room:
        yield room / target.name
        os.replace(room / target.name, target)


@contextmanager
def replacing_folder(target: str | Path) -> Iterator[Path]:
    """The same for a folder: an empty one to be filled, which then takes the place of an earlier result.

    Raises OutputError as `replacing` and `check_result_folder` do.
    """
    target = Path(target)
    check_result_folder(target)
    with _room_for(target, target.parent) as room:
        beside, old = room / "new", room / "old"
        beside.mkdir()
        yield beside
        try:
            if target.exists():
                os.replace(target, old)
            os.replace(beside, target)
        finally:
            if not target.exists() and old.exists():  # the second rename failed
                os.replace(old, target)


@contextmanager
def adding_to(folder: str | Path) -> Iterator[Path]:
    """A new folder to be filled; its files are moved into `folder`, over those of the same name, when the block ends.

    Other files of `folder` stay, unlike under `replacing_folder`: a training run keeps its own beside a model. Shards
    of an earlier model's weights do not, if weights were written. Raises OutputError as `replacing` does.
    """
    folder = Path(folder)
    with _room_for(folder, folder) as room:
        beside = room / folder.absolute().name  # the Hub's repositories are named after the folder
        beside.mkdir()
        yield beside
        names = {path.name for path in beside.iterdir()}
        for path in sorted(beside.iterdir()):
            if path.is_dir():  # a folder cannot be renamed over one that holds something
                shutil.rmtree(folder / path.name, ignore_errors=True)
            os.replace(path, folder / path.name)
        if any(name.startswith("model") and ".safetensors" in name for name in names):
            for stale in folder.glob("model*.safetensors*"):
                if stale.name not in names:
                    stale.unlink()


@contextmanager
def _room_for(target: Path, folder: Path) -> Iterator[Path]:
    """A hidden folder in `folder`, which is made where there is none, for what becomes `target`."""
    with _told(target):
        folder.mkdir(parents=True, exist_ok=True)
        room = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=folder))
    try:
        with _told(target):
            yield room
    finally:
        shutil.rmtree(room, ignore_errors=True)


def write_text(target: str | Path, text: str) -> Path:
    """Write a text file, whole or not at all."""
    with replacing(target) as beside:
        beside.write_text(text, encoding="utf-8")
    return Path(target)


def write_json(target: str | Path, content: Any) -> Path:
    """Write a JSON file, whole or not at all; floats keep all their digits."""
    return write_text(target, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def check_writable(folder: str | Path) -> Path:
    """Whether `folder` can be made and written, found out without leaving anything behind.

    Raises OutputError if not.
    """
    folder = Path(folder)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):  # asking for the mode bits is wrong for root and mounts
            return folder
    except OSError as error:
        raise _unwritable(folder, error) from error


def check_result_folder(folder: str | Path) -> Path:
    """Whether a model may take the place of `folder`: it must be absent, empty or hold an earlier model.

    Raises OutputError if it holds something else, which replacing it would delete, or cannot be written.
    """
    folder = check_writable(folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise OutputError(f"The folder {folder} holds files that are not a saved model; name a new or empty folder.")
    return folder


@contextmanager
def _told(target: Path) -> Iterator[None]:
    """An error of the file system as one sentence."""
    try:
        yield
    except OSError as error:
        read = str(getattr(error, "filename", None) or target)
        if isinstance(error, FileNotFoundError) and not read.startswith(str(target.parent)):
            raise  # some other file that the block was reading
        raise _unwritable(target, error) from error


def _unwritable(target: Path, error: OSError) -> OutputError:
    reason = error.strerror or str(error)
    return OutputError(f"{target} cannot be written ({reason}); name another place or make room there.")
