"""ViT and its kin with one class token: pre-LN encoders over image patches."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from hf_zipit.adapters.auto import Adapter, register


@register
class ViTAdapter(Adapter):
    model_types: ClassVar[tuple[str, ...]] = ("vit", "deit")

    def readout_positions(self, model: nn.Module) -> dict[str, str]:
        return {"image": "first"}
