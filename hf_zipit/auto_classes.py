"""Merged models are known to transformers' Auto classes once hf_zipit is imported, without importing either now.

`AutoModel.from_pretrained` of a merged model needs its classes registered, and those stand on half of transformers. So
they are imported right after the module of transformers that they register with, whenever that is.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

REGISTERING = {
    "transformers.models.auto.configuration_auto": "hf_zipit.modeling.configuration",
    "transformers.models.auto.modeling_auto": "hf_zipit.modeling.heads",
}
"""By module of transformers the one of ours that registers with it when it is imported."""


class Followed(MetaPathFinder):
    """Finds what others find, and has the modules of `REGISTERING` followed by ours."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name in REGISTERING else None
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_both(module: ModuleType) -> None:
                execute(module)
                import_module(REGISTERING[name])

            spec.loader.exec_module = execute_both  # type: ignore[method-assign]
        return spec


def announce() -> None:
    """Have merged models registered: now with what is imported already, else when it is."""
    sys.meta_path.insert(0, Followed())
    for theirs, ours in REGISTERING.items():
        if theirs in sys.modules:
            import_module(ours)
