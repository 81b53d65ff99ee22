"""CLIP: two pre-LN towers, whose projections are the task head, and each tower alone."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_zipit.adapters.auto import Adapter, register

PROJECTIONS = ("visual_projection", "text_projection", "logit_scale")


@register
class CLIPAdapter(Adapter):
    model_types: ClassVar[tuple[str, ...]] = ("clip", "clip_vision_model", "clip_text_model")

    def head(self, model: nn.Module) -> tuple[str, ...]:
        """The projections, which each task keeps: where both towers meet, their basis cannot be shared."""
        own = [name for name in (*PROJECTIONS, "classifier") if hasattr(model, name)]
        return tuple(own) or super().head(model)

    def outputs(self, model: nn.Module) -> tuple[str, ...] | None:
        """Not the towers' hidden states, which CLIP's outputs also carry: they would fix both residual streams."""
        projected = {"visual_projection": "image_embeds", "text_projection": "text_embeds"}
        embeds = tuple(field for name, field in projected.items() if hasattr(model, name))
        return (*embeds, "logits_per_image") if len(embeds) == 2 else embeds or None

    def text_inputs(self, config: object, generator: torch.Generator) -> dict[str, Tensor]:
        inputs = super().text_inputs(config, generator)
        inputs["input_ids"][:, -1] = config.eos_token_id  # type: ignore[attr-defined]  # the position that is pooled
        return inputs

    def readout_positions(self, model: nn.Module) -> dict[str, str]:
        pooled = not type(model).__name__.endswith("ForImageClassification")  # which averages the patches
        config = getattr(model.config, "text_config", None) or model.config
        # Old configurations have a wrong end token, 2; their models pool where the id is highest.
        text = "highest" if getattr(config, "eos_token_id", None) == 2 else "end"
        return {"text": text, **({"image": "first"} if pooled else {})}
