"""timm's models in transformers' `TimmWrapper`: blocks stand in `nn.Sequential`s, and timm itself knows the head."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_zipit.adapters.auto import Adapter, register
from hf_zipit.adapters.signature import images
from hf_zipit.errors import SpecError

INNER = "timm_model"


@register
class TimmAdapter(Adapter):
    model_types: ClassVar[tuple[str, ...]] = ("timm_wrapper",)

    def inputs(self, model: nn.Module) -> dict[str, Tensor]:
        """Images of the size that the model was made for; a third of it in each direction where any does."""
        inner = model.get_submodule(INNER)
        fixed = getattr(getattr(inner, "patch_embed", None), "img_size", None)
        channels, *size = settings(inner).get("input_size", (3, 64, 64))
        shape = {"image_size": fixed or [max(32, side // 3) for side in size], "num_channels": channels}
        return images(type("Sizes", (), shape), torch.Generator().manual_seed(0))

    def is_chain(self, module: nn.Module) -> bool:
        """Blocks are modules with modules in them: a row of plain layers is no chain."""
        if not isinstance(module, (nn.Sequential, nn.ModuleList)) or not len(module):
            return False
        return len({type(inner) for inner in module}) == 1 and any(True for _ in module[0].children())

    def towers(self, model: nn.Module) -> list[list[str]]:
        """All blocks as one chain: a ResNet's stages follow each other."""
        chains = [(path, module) for path, module in model.named_modules() if self.is_chain(module)]
        paths = [path for path, _ in chains]
        outer = [(p, m) for p, m in chains if not any(p.startswith(f"{other}.") for other in paths)]
        return [[f"{path}.{i}" for path, module in outer for i in range(len(module))]] if outer else []

    def head(self, model: nn.Module) -> tuple[str, ...]:
        if type(model).__name__ != "TimmWrapperForImageClassification":
            raise SpecError(
                f"{type(model).__name__} asks its own parameters where it runs, and a merged one's tasks have none; "
                "merge TimmWrapperForImageClassification, or timm's models themselves"
            )
        named = settings(model.get_submodule(INNER)).get("classifier") or ()
        return tuple(f"{INNER}.{name}" for name in ((named,) if isinstance(named, str) else named))


def settings(inner: nn.Module) -> dict[str, Any]:
    """What timm knows of one of its models."""
    return getattr(inner, "pretrained_cfg", None) or getattr(inner, "default_cfg", None) or {}
