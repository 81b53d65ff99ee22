"""Whether results may go where they are to go, found out before any work."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

from hf_zipit.errors import OutputError
from hf_zipit.files.atomic import unwritable
from hf_zipit.files.folder import ROOM, check_not_foreign, recover
from hf_zipit.files.known import is_ours
from hf_zipit.files.places import folder_of

LONGEST = 255
"""Bytes that file systems allow a name."""


def check_writable(folder: str | Path) -> Path:
    """The folder, which can be made and written; found out without leaving anything behind.

    Raises OutputError if it cannot.
    """
    folder = Path(folder)
    try:
        folder.resolve()
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=existing):  # asking for the mode bits is wrong for root and mounts
            return folder
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise unwritable(folder, error) from error


def check_result_folder(folder: str | Path, inputs: Iterable[str | Path] = ()) -> Path:
    """The folder, into which a model may be written: it is absent, empty or holds a model that this library wrote.

    Args:
        folder: to be written.
        inputs: folders that are read; the result may neither be one of them nor hold one.

    Raises:
        OutputError: it holds something else, is an input, or cannot be written.
    """
    folder = check_writable(folder)
    own = folder.resolve()
    for source in inputs:
        read = folder_of(source)
        if read and (own == read.resolve() or own in read.resolve().parents):
            raise OutputError(f"The folder {folder} is or holds {source}, which is to be read; name another folder.")
    recover(folder)
    check_not_foreign(folder)
    others = [path for path in folder.iterdir() if path.name != ROOM] if folder.is_dir() else []
    if others and not is_ours(folder):
        raise OutputError(f"The folder {folder} holds files that are not a saved model; name a new or empty folder.")
    return folder


def unfit(name: str) -> str | None:
    """Why a name cannot be that of a folder, in a few words; None if it can."""
    if not name.strip():
        return "is empty"
    if name in (".", "..") or "/" in name or "\\" in name:
        return "is a path"
    return unprintable(name)


def unprintable(name: str) -> str | None:
    """Why a name cannot be shown, or stored in a file's name, in a few words; None if it can."""
    if not name.isprintable():
        return "has characters that cannot be printed"
    if len(name.encode("utf-8", "surrogatepass")) > LONGEST:
        return f"is longer than {LONGEST} bytes"
    return None
