"""A disk that is full, or files that may not grow, are one sentence; the old result is whole, nothing else is left.

The disk is a small tmpfs in a mount namespace of a child process, where such a process may have one; files that may
not grow are those beyond `RLIMIT_FSIZE`, which every child can set.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_zipit.cli import main
from hf_zipit.errors import OutputError
from hf_zipit.observation.moments import Moments

from .killing import EVERYTHING, told_by
from .test_commands import root  # noqa: F401 - the experts and recipes of the commands
from .test_kills import content, merged

NEW_NAMESPACE, NEW_USER, PRIVATE = 0x20000, 0x10000000, 0x4000 | 0x40000
DISK = 1_000_000
SHARES = (0.0, 0.1, 0.5, 0.9) if EVERYTHING else (0.5,)
"""How much of the old result's size is left, or of its largest file's may be in one file; the new one is larger."""


def mount(folder: Path) -> bool:
    """Whether there is now a small disk of this process alone at the folder."""
    libc, user, group = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    if libc.unshare(NEW_NAMESPACE):
        if libc.unshare(NEW_NAMESPACE | NEW_USER):
            return False
        for file, text in {"setgroups": "deny", "uid_map": f"0 {user} 1", "gid_map": f"0 {group} 1"}.items():
            Path("/proc/self", file).write_text(text)
    libc.mount(b"none", b"/", None, PRIVATE, None)
    return not libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={DISK}".encode())


def fill(folder: Path, left: int) -> None:
    """Leave so many bytes of the disk at the folder."""
    free = os.statvfs(folder)
    with open(folder / "filler", "wb") as file:
        file.write(b"\0" * max(0, free.f_bavail * free.f_frsize - left))


def save(folder: Path, depth: float, _: Path) -> None:
    merged(depth).save_pretrained(folder / "model")


def moments(folder: Path, depth: float, _: Path) -> None:
    made = Moments(("a", "b"), fingerprint={"experts": {"a": "1", "b": "2"}})
    made.add(("space",), [torch.full((5, 80), depth), torch.full((5, 80), depth)])
    made.save(folder / "model" / "moments.safetensors")


def command(*arguments: object) -> None:
    """Raises OutputError with what is told on stderr."""
    sys.argv = ["hf-zipit", *map(str, arguments)]
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()) as told:
        try:
            main()
        except SystemExit as end:
            if end.code:
                raise OutputError(told.getvalue().strip()) from None


def merge(folder: Path, depth: float, root: Path) -> None:  # noqa: F811
    command("merge", f"a={root / 'low'}", f"b={root / 'high'}", "-o", folder / "model", "-d", depth, "-q")


def run(folder: Path, depth: float, root: Path) -> None:  # noqa: F811
    command("run", root / f"{depth}.yaml", "-o", folder, "-q")


WORK: dict[str, Callable[[Path, float, Path], None]] = {"save": save, "moments": moments, "merge": merge, "run": run}


@pytest.mark.parametrize("kind", ["disk", "limit"])
@pytest.mark.parametrize("name", WORK if EVERYTHING else ["save", "moments"])
def test_a_full_disk_is_one_sentence_and_leaves_the_old_result(
    kind: str,
    name: str,
    tmp_path: Path,
    root: Path,  # noqa: F811
) -> None:
    def attempt(share: float) -> dict[str, Any] | None:
        if kind == "disk" and not mount(tmp_path):
            return {}
        WORK[name](tmp_path, 1.0, root)
        before = content(tmp_path / "model")
        sizes = list(map(len, before.values()))
        if kind == "disk":
            fill(tmp_path, int(share * sum(sizes)))
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * max(sizes)),) * 2)
        try:
            WORK[name](tmp_path, 0.5, root)
            error = None
        except OutputError as raised:
            error = str(raised)
        strays = [path.name for path in tmp_path.iterdir() if ".hf_zipit" in path.name]
        return {"error": error, "whole": content(tmp_path / "model") == before, "strays": strays}

    for share in SHARES:
        found = told_by(lambda share=share: attempt(share))
        assert found is not None, "what was raised is not one sentence"
        if not found:
            pytest.skip("no disk can be mounted here")
        assert found["error"] and len(found["error"].splitlines()) == 1 and str(tmp_path) in found["error"], found
        assert found["whole"] and not found["strays"], found
