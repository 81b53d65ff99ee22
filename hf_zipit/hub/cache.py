"""What loading a model from the Hub left on this machine: the folder of its files, and which commit they are of.

Invariants: nothing is downloaded unless the caller names what.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download, try_to_load_from_cache

from hf_zipit.files.places import folder_of

CONFIGS = ("config.json", "adapter_config.json", "README.md")
"""One of them is there wherever a model was loaded; the last where it lies in a folder of its repo."""


def local_folder(source: str | Path | None, revision: str | None = None, fetch: Sequence[str] = ()) -> Path | None:
    """The folder in which the files of a model lie: the one that was named, or the cache's; None if there is neither.

    `fetch` names patterns of the files to download first.
    """
    if (folder := folder_of(source)) is not None:
        return folder
    if not source:
        return None
    try:
        if fetch:
            return Path(snapshot_download(str(source), revision=revision, allow_patterns=list(fetch)))
        # A snapshot of all files need not be there, so it is found by one of them.
        found = [try_to_load_from_cache(str(source), name, revision=revision) for name in CONFIGS]
    except (OSError, ValueError):  # the Hub does not answer, or it is not a repo id: there is nothing to take
        return None
    return next((Path(path).parent for path in found if isinstance(path, str)), None)


def inner_folder(repo: str, revision: str | None, inner: str) -> tuple[Path, str]:
    """Where what a repo holds in one of its folders is on this machine, to which it is downloaded, and its commit."""
    snapshot = Path(snapshot_download(repo, revision=revision, allow_patterns=[f"{inner}/*", "README.md"]))
    return snapshot / inner, snapshot.name


def commit_of(source: str | None, revision: str | None = None) -> str | None:
    """The commit of a repo that was loaded with `revision`; None for folders.

    Without a revision it is only told where there is no doubt, the cache holding a single commit of the repo: a loaded
    model does not say which one it came from.
    """
    if not source or folder_of(source) is not None:
        return None
    folder = local_folder(source, revision)
    if folder is None or (revision is None and len(list(folder.parent.iterdir())) > 1):
        return None
    return folder.name


def looks_local(source: str) -> bool:
    """Whether a model or data set can only be a folder: what is on the Hub is `name` or `user/name`, and `@` more."""
    return source.startswith((".", "/", "~")) or source.partition("@")[0].count("/") > 1


def taken_apart(source: str) -> tuple[str, str | None, str]:
    """The repo id, revision and folder in the repo of `user/name@revision/folder`, as the Hub's file system has it.

    What is there as a folder, or has no `@`, is itself: then there is neither.
    """
    repo, at, rest = source.partition("@")
    if not at or folder_of(source) is not None:
        return source, None, ""
    count = 3 if rest.startswith("refs/pr/") else 1
    parts = rest.strip("/").split("/")
    return repo, "/".join(parts[:count]), "/".join(parts[count:])


def is_repo(source: str) -> bool:
    """Whether a source is a repo id and no folder."""
    return not looks_local(source) and folder_of(source) is None
