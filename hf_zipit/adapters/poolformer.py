"""PoolFormer: stages of pooling layers; the layers are the blocks."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from hf_zipit.adapters.auto import Adapter, register


@register
class PoolFormerAdapter(Adapter):
    model_types: ClassVar[tuple[str, ...]] = ("poolformer",)

    def towers(self, model: nn.Module) -> list[list[str]]:
        """The layers of all stages, as one chain: `auto` takes the lists of patch embeddings and of stages for two."""
        path, encoder = next((path, module) for path, module in model.named_modules() if path.endswith("encoder"))
        return [[f"{path}.block.{i}.{j}" for i, stage in enumerate(encoder.block) for j in range(len(stage))]]
