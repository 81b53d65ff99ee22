"""What an adapter declares about one model family, and defaults that fit most of them.

An adapter says how to feed a model of its family, where its blocks are and which modules are its task head; everything
else is inferred from the traced forward pass. It works on live modules, never on the names in a checkpoint file.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from hf_zipit.adapters.signature import (
    BATCH,
    GRIDS,
    KINDS,
    TOKENS,
    boxes,
    grids,
    image_tokens,
    images,
    patches,
    series,
    sound,
    videos,
)
from hf_zipit.registry import ADAPTERS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SOME_WORDS = 90
"""Size of a vocabulary whose configuration gives none."""


class Adapter:
    """The `auto` adapter: fits every class whose defaults below are right."""

    model_types: ClassVar[tuple[str, ...]] = ()

    def inputs(self, model: nn.Module) -> dict[str, Tensor]:
        """Small example inputs, on the CPU, batch first."""
        config = model.config
        generator = torch.Generator().manual_seed(0)
        names, accepted = self.input_names(model), forward_names(model)
        decoding = "decoder_input_ids" in accepted and getattr(config, "is_encoder_decoder", False)
        inputs: dict[str, Tensor] = {}
        if "input_ids" in names:
            inputs |= self.text_inputs(text_config(config), generator)
            inputs |= boxes(accepted, inputs["input_ids"].shape[1])
        vision = getattr(config, "vision_config", None) or config
        seen = patches(vision, accepted, generator)
        if not seen and "pixel_values" in names:
            seen = self.image_inputs(vision, generator)
        inputs = with_images(inputs, seen, model) if seen and inputs else inputs | seen
        inputs |= videos(config, accepted, generator) | sound(config, accepted, generator)
        inputs |= series(config, accepted, generator)
        if decoding:
            text = inputs.get("input_ids")
            if text is None:
                text = self.text_inputs(text_config(config), generator)["input_ids"]
            inputs["decoder_input_ids"] = text.flip(1)
        if getattr(config, "use_cache", False) and "use_cache" in accepted:
            inputs["use_cache"] = False  # a cache object among the outputs cannot be exported
        return inputs

    def input_names(self, model: nn.Module) -> tuple[str, ...]:
        """Which of `input_ids` and `pixel_values` the model takes."""
        accepted = forward_names(model)
        return tuple(name for name in ("input_ids", "pixel_values") if name in accepted)

    def text_inputs(self, config: object, generator: torch.Generator) -> dict[str, Tensor]:
        limit = getattr(config, "max_position_embeddings", None) or 0
        tokens = max(1, min(TOKENS, limit - 2)) if limit > 0 else TOKENS  # XLNet says -1: any length
        words = getattr(config, "vocab_size", None) or SOME_WORDS
        ids = torch.randint(3, max(words, 4), (BATCH, tokens), generator=generator)
        end = getattr(config, "eos_token_id", None)
        if getattr(config, "is_encoder_decoder", False) and isinstance(end, int) and end < words:
            ids[ids == end] = 3 if end != 3 else 4  # one end in every text: some classifiers read there
            ids[:, -1] = end
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def image_inputs(self, config: object, generator: torch.Generator) -> dict[str, Tensor]:
        return images(config, generator)

    def towers(self, model: nn.Module) -> list[list[str]]:
        """Chains of block paths: the longest list of equal modules in every part of the model that has one.

        Not in the head, where there are others: YOLOS' classifiers have three layers, and it may have two blocks.
        """
        every = [(path, module) for path, module in model.named_modules() if self.is_chain(module)]
        head = tuple(f"{prefix}." for prefix in self.head(model))
        chains = [(path, module) for path, module in every if not f"{path}.".startswith(head)] or every
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
        """Path prefixes of the task head: whatever stands beside the base model, or beside its parts (T5, SigLIP)."""
        base = getattr(model, "base_model_prefix", "")
        if not base or getattr(model, base, None) is model or is_base_model(type(model)):
            return ()
        shared = {base} if hasattr(model, base) else parts_of_base(model)
        return tuple(name for name in parts(model) if name not in shared)

    def outputs(self, model: nn.Module) -> tuple[str, ...] | None:
        """The output fields that count; None for every tensor, but no hidden states where there are logits."""
        return None

    def features(self, model: nn.Module) -> tuple[str, ...]:
        """Output fields in a basis that the merged model may change, because each task reads them through U_t."""
        hidden = ("last_hidden_state", "encoder_last_hidden_state", "image_hidden_states", "pooler_output")
        return () if self.head(model) else hidden

    def readout_positions(self, model: nn.Module) -> dict[str, str]:
        """Which positions the head reads: see `hf_zipit.refit.positions.Positions`."""
        return {}


def register(adapter: type[Adapter]) -> type[Adapter]:
    """Decorator that makes a class the adapter of its `model_types`; raises ValueError if one has an adapter."""
    for model_type in adapter.model_types:
        ADAPTERS.add(model_type, adapter())
    return adapter


def text_config(config: object) -> object:
    """The part of a configuration that has the vocabulary."""
    own = getattr(config, "text_config", None)
    if own is None and not hasattr(config, "vocab_size") and hasattr(config, "get_text_config"):
        return config.get_text_config(decoder=True)
    return config if own is None else own


def is_base_model(model_class: type[nn.Module]) -> bool:
    """Whether a class is its family's base model. One may call a part of itself by the name of that (DINOv3's)."""
    named = (names if isinstance(names, tuple) else (names,) for names in MODEL_MAPPING_NAMES.values())
    return any(model_class.__name__ in names for names in named)


def parts_of_base(model: PreTrainedModel) -> set[str]:
    """What a family's base model consists of; all that a model consists of where it has none that can be made."""
    named = MODEL_MAPPING_NAMES.get(model.config.model_type, "")
    name = named if isinstance(named, str) else named[0]
    base_class = getattr(sys.modules[type(model).__module__], name, None)
    if base_class is None:
        return set(parts(model))
    with torch.device("meta"):
        return set(parts(base_class(copy.deepcopy(model.config))))


def parts(model: nn.Module) -> list[str]:
    """Names of the modules, parameters and buffers (BART's bias of the logits) that a model itself holds."""
    own = (*model.named_parameters(recurse=False), *model.named_buffers(recurse=False))
    return [name for name, _ in (*model.named_children(), *own)]


def with_images(text: Mapping[str, Tensor], seen: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Text and images together; with as many image tokens in the text as the images need, where they stand in it.

    Where a model wants image tokens and does not tell how many, it gets the text alone.
    """
    token = getattr(model.config, "image_token_id", None)
    token = getattr(model.config, "image_token_index", None) if token is None else token
    accepted = {*forward_names(model)}
    unsaid = GRIDS & accepted - seen.keys()
    if token is None:
        return dict(text) if unsaid else {**text, **seen}
    count = None if unsaid and grids(seen) else image_tokens(model, seen)
    if count is None:
        return dict(text)
    ids = text["input_ids"].masked_fill(text["input_ids"] == token, 3 if token != 3 else 4)
    ids = torch.cat([ids[:, :1], torch.full((len(ids), count), token), ids[:, 1:]], 1)
    if not grids(seen):
        return {**text, **seen, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    # Which tokens a mask leaves would have to be known: where they stand in an image is computed of them alone.
    kinds = {KINDS: (ids == token).long()} if KINDS in accepted else {}
    return {**seen, "input_ids": ids, **kinds}


def forward_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a model's forward."""
    return tuple(inspect.signature(type(model).forward).parameters)
