"""ResNet: convolutional stages whose layers are the blocks."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from hf_zipit.adapters.auto import Adapter, register


@register
class ResNetAdapter(Adapter):
    model_types: ClassVar[tuple[str, ...]] = ("resnet",)

    def towers(self, model: nn.Module) -> list[list[str]]:
        encoder, module = next((name, module) for name, module in model.named_modules() if name.endswith("encoder"))
        layers = [range(len(stage.layers)) for stage in module.stages]
        return [[f"{encoder}.stages.{i}.layers.{j}" for i, numbers in enumerate(layers) for j in numbers]]
