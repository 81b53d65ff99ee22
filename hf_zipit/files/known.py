"""Which files belong to a model folder: only these are replaced there, and only these travel to the Hub.

And which keys of a configuration never do.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

CONFIG = "config.json"

MANIFEST = ".hf_zipit.json"
"""Says which files of a folder this library wrote."""

PROCESSORS = "processors"

PROCESSOR_FILES = (
    "*processor_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.model", "*.bpe", "chat_template*",
)  # fmt: skip
"""Names of the files that a processor may consist of."""

WEIGHTS = ("model*.safetensors", "model*.safetensors.index.json")

COMPANIONS = (
    CONFIG, "generation_config.json", "merge_config.json", "README.md", "LICENSE*", "recipe.yaml", "*.png",
    "modeling_hf_zipit.py", "moments.safetensors", "statistics.safetensors",
)  # fmt: skip

SECRETS = ("token", "use_auth_token", "hf_token", "auth_token", "api_key")
"""Keys that a configuration may have got from somebody's call, and that are nobody else's business."""


def belongs(name: str) -> bool:
    """Whether a file, by its path relative to a model's folder, is one that belongs to a model."""
    path = PurePosixPath(name)
    if path.parts[:-1] == (".eval_results",):
        return path.suffix == ".yaml"
    if path.is_absolute() or ".." in path.parts or any(part.startswith(".") for part in path.parts):
        return False
    if path.parts[0] == PROCESSORS and len(path.parts) == 3:
        return _fits(path.name, PROCESSOR_FILES)
    return len(path.parts) == 1 and _fits(path.name, (*WEIGHTS, *COMPANIONS, *PROCESSOR_FILES))


def leads_out(path: Path, folder: Path) -> bool:
    """Whether a file of a folder is, through links, one outside of it; the Hub's cache is made of links of its own."""
    real, root = path.resolve(), folder.resolve()
    homes = [root, *(above.parent / "blobs" for above in root.parents if above.name == "snapshots")]
    return not any(home in real.parents for home in homes)


def is_processor_file(path: Path) -> bool:
    return path.is_file() and _fits(path.name, PROCESSOR_FILES)


def model_type(folder: Path) -> str | None:
    """What kind of model a folder holds; None where it holds none, "" where its configuration does not say."""
    path = folder / CONFIG
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return ""
    return str(content.get("model_type") or "") if isinstance(content, dict) else ""


def manifest(folder: Path, files: list[str]) -> dict[str, object]:
    """What the manifest of a folder holds: the files in it that this library wrote, and its configuration's sha256."""
    return {"files": files, CONFIG: _digest(folder)}


def written_files(folder: Path) -> list[str]:
    """The files in a folder that its manifest or, without one, the kind of the model says this library wrote."""
    if (found := _manifest(folder)) is not None:
        names = found.get("files")
        return [n for n in names if isinstance(n, str) and belongs(n)] if isinstance(names, list) else []
    if model_type(folder) != "zipit":
        return []
    paths = [path for pattern in WEIGHTS for path in folder.glob(pattern)]
    paths += (folder / PROCESSORS).glob("*/*")
    return [name for path in paths if belongs(name := path.relative_to(folder).as_posix())]


def is_ours(folder: Path) -> bool:
    """Whether a folder holds what this library wrote: a merged model, or the one that its manifest tells of."""
    found = _manifest(folder)
    return model_type(folder) == "zipit" or (found is not None and found.get(CONFIG) == _digest(folder))


def _manifest(folder: Path) -> dict[str, object] | None:
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _digest(folder: Path) -> str | None:
    path = folder / CONFIG
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _fits(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def without_secrets(value: Any) -> Any:
    """Nested values without the keys that hold what one logs in with."""
    if isinstance(value, Mapping):
        return {key: without_secrets(item) for key, item in value.items() if key not in SECRETS}
    return [without_secrets(item) for item in value] if isinstance(value, list) else value
