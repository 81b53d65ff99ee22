"""One file, whole or not at all: it is written in a hidden folder beside its place, brought to disk, and renamed.

The hidden folder is named after its target and locked while it is written in. So writers of one target wait for each
other, and what a killed one left is found and removed by the next.

Invariants: at every moment, and after a crash at any moment, the target is either what it was or complete. A full
disk, a missing permission or a path that leads through a file is told in one sentence, as an `OutputError`.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from hf_zipit.errors import OutputError

try:
    import fcntl
except ImportError:  # Windows: writers are not kept apart there
    fcntl = None  # type: ignore[assignment]

PATIENCE = 600.0
"""Seconds that a writer waits for another one of the same target."""


@contextmanager
def replacing(target: str | Path) -> Iterator[Path]:
    """A new path, to be written; it takes the place of `target` when the block ends without an error.

    An older file's permissions stay. A target that is a link is replaced itself; what it points to is left alone.
    Raises OutputError if the folder cannot be written, or the disk is full.
    """
    target = Path(target)
    with told(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with room(target.parent / f".{target.name}.hf_zipit", target) as place:
            empty(place)
            try:
                yield place / target.name
                publish(place / target.name, target)
            finally:
                shutil.rmtree(place, ignore_errors=True)


def write_text(target: str | Path, text: str) -> Path:
    """Write a text file, whole or not at all."""
    with replacing(target) as beside:
        beside.write_text(text, encoding="utf-8")
    return Path(target)


def write_json(target: str | Path, content: Any) -> Path:
    """Write a JSON file, whole or not at all; floats keep all their digits."""
    return write_text(target, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def publish(written: Path, target: Path) -> None:
    """Rename a written file over `target`, so that a crash of the machine leaves one of the two, too."""
    if target.exists() and not target.is_symlink():
        shutil.copymode(target, written)
    to_disk(written)
    os.replace(written, target)
    to_disk(target.parent)


def to_disk(path: Path) -> None:
    """Have a file or folder written through; file systems that cannot do that for folders are passed over."""
    with suppress(PermissionError):  # Windows opens no folders
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError:
            if not path.is_dir():
                raise
        finally:
            os.close(handle)


@contextmanager
def room(place: Path, target: Path, wait: float = PATIENCE) -> Iterator[Path]:
    """The folder `place`, made where there is none and ours alone until the block ends.

    What a killed writer left is in it still. The block removes it when it is done with it. Raises OutputError if
    another process writes `target` for longer than `wait` seconds.
    """
    handle = _locked(place, target, time.monotonic() + wait)
    try:
        yield place
    finally:
        if handle is not None:
            os.close(handle)  # gives the lock back


def _locked(place: Path, target: Path, deadline: float) -> int | None:
    while True:
        place.mkdir(exist_ok=True)
        if fcntl is None:
            return None
        try:
            handle = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
        except FileNotFoundError:
            continue  # another writer was done with it in between
        if _lock(handle, place, deadline):
            return handle
        os.close(handle)
        if time.monotonic() >= deadline:
            raise OutputError(f"{target} is being written by another process; wait for it, or name another place.")
        time.sleep(0.02)


def _lock(handle: int, place: Path, deadline: float) -> bool:
    """Whether the folder is locked and still the one at `place`."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a network file system without locks
        pass
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), os.stat(place, follow_symlinks=False))
    return False


def empty(folder: Path) -> None:
    """Remove what is in a folder of ours."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def told(target: Path) -> Iterator[None]:
    """An error of the file system as one sentence."""
    try:
        yield
    except SafetensorError as error:  # its writer has no other
        raise OutputError(f"{target} cannot be written ({error}); name another place or make room there.") from error
    except OSError as error:
        read = str(getattr(error, "filename", None) or target)
        if isinstance(error, FileNotFoundError) and not read.startswith(str(target.parent)):
            raise  # some other file that the block was reading
        raise unwritable(target, error) from error


def unwritable(target: Path, error: Exception) -> OutputError:
    reason = getattr(error, "strerror", None) or str(error)
    return OutputError(f"{target} cannot be written ({reason}); name another place or make room there.")
