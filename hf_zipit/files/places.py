"""What a text that somebody wrote for a place on this machine means; it may be no possible path at all."""

from __future__ import annotations

from pathlib import Path


def folder_of(source: str | Path | None) -> Path | None:
    """The folder that a text names, with `~` for home; None where there is none, or could not be one."""
    try:
        folder = Path(source or "").expanduser()
        return folder if source and folder.is_dir() else None
    except (OSError, ValueError, RuntimeError):  # too long, with a NUL, the home of nobody
        return None
