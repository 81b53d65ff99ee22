"""What a saved folder needs so that `trust_remote_code=True` loads it without `import hf_zipit` first.

`transformers` copies the files that `auto_map` names, flat, so a package cannot be copied; two lines that import it
can. Where hf_zipit is not installed, `transformers` says so from the import line.
"""

from __future__ import annotations

from pathlib import Path

REMOTE_MODULE = "modeling_hf_zipit"


def auto_map(auto_class: str, model_class: str) -> dict[str, str]:
    """`config.auto_map` of a merged model; `auto_class` is the Auto class that its own class belongs to."""
    classes = {"AutoConfig": "ZipItConfig", "AutoModel": "ZipItModel", auto_class: model_class}
    return {auto: f"{REMOTE_MODULE}.{name}" for auto, name in classes.items()}


def write_remote_module(folder: str | Path, model_class: str) -> None:
    """Write `modeling_hf_zipit.py` beside the weights."""
    names = sorted({"ZipItConfig", "ZipItModel", model_class})
    text = (
        f'"""Loads this merged model with the hf_zipit package."""\nfrom hf_zipit.modeling import {", ".join(names)}\n'
    )
    Path(folder, f"{REMOTE_MODULE}.py").write_text(text, encoding="utf-8")
