"""What an adapter declares about one model family, and defaults that fit most of them.

An adapter says how to feed a model of its family, where its blocks are and which modules are its task head; everything
else is inferred from the traced forward pass. It works on live modules, never on the names in a checkpoint file.
"""

from __future__ import annotations

import inspect
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_zipit.registry import ADAPTERS

BATCH = 2  # larger than one: an axis of size one cannot be told from no axis
TOKENS = 7  # a prime, unlike any width: easy to recognise in an error


class Adapter:
    """The `auto` adapter: fits every class whose defaults below are right."""

    model_types: ClassVar[tuple[str, ...]] = ()

    def inputs(self, model: nn.Module) -> dict[str, Tensor]:
        """Small example inputs, on the CPU, batch first."""
        config = model.config
        generator = torch.Generator().manual_seed(0)
        names = self.input_names(model)
        inputs: dict[str, Tensor] = {}
        if "input_ids" in names:
            inputs |= self.text_inputs(getattr(config, "text_config", None) or config, generator)
            if "decoder_input_ids" in forward_names(model) and getattr(config, "is_encoder_decoder", False):
                inputs["decoder_input_ids"] = inputs["input_ids"].flip(1)
        if "pixel_values" in names:
            inputs |= self.image_inputs(getattr(config, "vision_config", None) or config, generator)
        if "input_values" in names:
            inputs["input_values"] = self.waveforms(config, generator)
        if getattr(config, "use_cache", False) and "use_cache" in forward_names(model):
            inputs["use_cache"] = False  # a cache object among the outputs cannot be exported
        return inputs

    def input_names(self, model: nn.Module) -> tuple[str, ...]:
        """Which of `input_ids`, `pixel_values` and `input_values` (if those are waveforms) the model takes."""
        known = ("input_ids", "pixel_values", *(("input_values",) if hasattr(model.config, "conv_stride") else ()))
        accepted = forward_names(model)
        return tuple(name for name in known if name in accepted)

    def text_inputs(self, config: object, generator: torch.Generator) -> dict[str, Tensor]:
        limit = getattr(config, "max_position_embeddings", None) or TOKENS
        tokens = max(1, min(TOKENS, limit - 2))
        ids = torch.randint(3, max(config.vocab_size, 4), (BATCH, tokens), generator=generator)
        end = getattr(config, "eos_token_id", None)
        if getattr(config, "is_encoder_decoder", False) and isinstance(end, int) and end < config.vocab_size:
            ids[ids == end] = 3 if end != 3 else 4  # one end in every text: some classifiers read there
            ids[:, -1] = end
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def image_inputs(self, config: object, generator: torch.Generator) -> dict[str, Tensor]:
        size = getattr(config, "image_size", None) or 64
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        channels = getattr(config, "num_channels", 3)
        return {"pixel_values": torch.randn(BATCH, channels, height, width, generator=generator)}

    def waveforms(self, config: object, generator: torch.Generator) -> Tensor:
        samples = TOKENS  # after the convolutions
        for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
            samples = (samples - 1) * stride + kernel
        return torch.randn(BATCH, samples, generator=generator)

    def towers(self, model: nn.Module) -> list[list[str]]:
        """Chains of block paths: the longest list of equal modules in every part of the model that has one."""
        chains = [(path, module) for path, module in model.named_modules() if self.is_chain(module)]
        outermost = [
            (path, module)
            for path, module in chains
            if not any(path.startswith(f"{other}.") for other, _ in chains if other != path)
        ]
        longest = max((len(module) for _, module in outermost), default=0)
        return [
            [f"{path}.{i}" for i in range(len(module))]
            for path, module in outermost
            if len(module) == longest and longest > 0
        ]

    def is_chain(self, module: nn.Module) -> bool:
        return isinstance(module, nn.ModuleList) and len(module) > 0 and len({type(m) for m in module}) == 1

    def head(self, model: nn.Module) -> tuple[str, ...]:
        """Path prefixes of the task head: whatever stands beside the base model."""
        base = getattr(model, "base_model_prefix", "")
        if not base or not hasattr(model, base) or getattr(model, base) is model:
            return ()
        named = [*model.named_children(), *model.named_parameters(recurse=False)]
        return tuple(name for name, _ in named if name != base)

    def outputs(self, model: nn.Module) -> tuple[str, ...] | None:
        """The output fields that count; None for `logits` where there are any, else every tensor."""
        return None

    def features(self, model: nn.Module) -> tuple[str, ...]:
        """Output fields in a basis that the merged model may change, because each task reads them through U_t."""
        return () if self.head(model) else ("last_hidden_state", "pooler_output")

    def readout_positions(self, model: nn.Module) -> dict[str, str]:
        """Which positions the head reads: see `hf_zipit.refit.positions.Positions`."""
        return {}


def register(adapter: type[Adapter]) -> type[Adapter]:
    """Decorator that makes a class the adapter of its `model_types`; raises ValueError if one has an adapter."""
    for model_type in adapter.model_types:
        ADAPTERS.add(model_type, adapter())
    return adapter


def forward_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a model's forward."""
    return tuple(inspect.signature(type(model).forward).parameters)
