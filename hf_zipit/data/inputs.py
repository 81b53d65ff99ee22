"""Columns of calibration or evaluation data -> the tensors that a model's forward takes.

What a model takes is read from its signature, its `main_input_name` and its configuration. Columns that it does not
take are dropped, labels among them: nothing here may learn from labels. Raw images and texts go through the processor;
sequences of different length are padded per batch, with an attention mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_zipit.errors import DataError
from hf_zipit.hub.processors import OwnProcessor

Columns = dict[str, Any]

IMAGE_COLUMNS = ("image", "img", "images")
TEXT_COLUMNS = ("text", "sentence")


@dataclass(frozen=True)
class ModelInputs:
    """What a model's forward takes.

    `accepted` is None where it takes any keyword; `texts` says that tokens have other numbers than with the tokenizer
    that the model came with, so that numbers are not taken; `purpose`: what data is for.
    """

    architecture: str
    main: str
    accepted: frozenset[str] | None
    required: tuple[str, ...]
    pad: int
    channels: int | None
    purpose: str = "calibration"
    texts: bool = False

    @classmethod
    def of(cls, model: nn.Module) -> ModelInputs:
        main = getattr(model, "main_input_name", None)
        return replace(cls.of_class(type(model), getattr(model, "config", None), main), texts=renumbered(model))

    @classmethod
    def of_class(cls, model_class: type[nn.Module], config: Any, main: str | None = None) -> ModelInputs:
        """What models of a class take that have this configuration."""
        # The class's forward: accelerate wraps the instance's.
        parameters = list(inspect.signature(model_class.forward).parameters.values())[1:]
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and not is_label(p.name)]
        text, vision = (getattr(config, name, None) or config for name in ("text_config", "vision_config"))
        return cls(
            architecture=model_class.__name__,
            main=main or (named[0].name if named else "inputs"),
            accepted=frozenset(p.name for p in named) or None,
            required=tuple(p.name for p in named if p.default is p.empty),
            pad=getattr(text, "pad_token_id", None) or 0,
            channels=getattr(vision, "num_channels", None),
        )

    def takes(self, name: str) -> bool:
        return not is_label(name) and (self.accepted is None or name in self.accepted)

    def expected(self) -> str:
        return ", ".join(dict.fromkeys((self.main, *self.required)))


def renumbered(model: nn.Module) -> bool:
    """Whether the tokens of an expert have other numbers than with the tokenizer that it came with."""
    return hasattr(model, "held_rows")


def is_label(name: str) -> bool:
    return "label" in name or name in ("start_positions", "end_positions")


def prepare(columns: Columns, inputs: ModelInputs, processor: Any, name: str) -> dict[str, Tensor]:
    """The model's inputs made of the columns of one batch: tensors `[samples, ...]`.

    Raises DataError if the model's input is not among the columns and cannot be made of them.
    """
    ready = {column: values for column, values in columns.items() if inputs.takes(column)}
    if inputs.texts and (inputs.main in ready or not isinstance(processor, OwnProcessor)):
        raise DataError(
            f"With vocabulary='union' tokens have new numbers, so the {inputs.purpose} data{name} must be texts, and "
            "no processor is given: each expert's own tokenizer reads them."
        )
    if isinstance(processor, OwnProcessor):
        raw = inputs.main not in ready and first_of((*IMAGE_COLUMNS, *TEXT_COLUMNS), columns)
        processor = processor.loaded if raw else None
    if inputs.main not in ready and processor is not None:
        try:
            processed = process(columns, processor, inputs.channels)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{type(processor).__name__} cannot prepare the {inputs.purpose} data{name}: {error}"
            ) from error
        ready |= {column: values for column, values in processed.items() if inputs.takes(column)}
    if not ready or any(required not in ready for required in inputs.required):
        raise DataError(
            f"The {inputs.purpose} data{name} has the columns {sorted(columns)}, but {inputs.architecture} reads "
            f"{inputs.expected()}: rename a column, or give an 'image' or 'text' column and its processor."
        )
    return _tensors(ready, inputs, name)


def process(columns: Mapping[str, Any], processor: Any, channels: int | None, kind: str = "pt") -> Mapping[str, Any]:
    """What an image processor, a tokenizer or both in one makes of the raw columns that it understands.

    Grey and palette images become RGB unless the model reads one channel: image processors take them as they are.
    """
    parameters = inspect.signature(processor).parameters
    arguments: Columns = {}
    if "images" in parameters and (column := first_of(IMAGE_COLUMNS, columns)):
        arguments["images"] = [
            image.convert("RGB") if channels != 1 and getattr(image, "mode", "RGB") != "RGB" else image
            for image in columns[column]
        ]
    if "text" in parameters and (column := first_of(TEXT_COLUMNS, columns)):
        arguments |= {"text": list(columns[column]), "padding": True, "truncation": True}
    return processor(**arguments, return_tensors=kind) if arguments else {}


def first_of(names: Sequence[str], columns: Container[str]) -> str | None:
    """The first of the names that is a column."""
    return next((name for name in names if name in columns), None)


def _tensors(columns: Columns, inputs: ModelInputs, name: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for column, values in columns.items():
        pad = inputs.pad if column == "input_ids" else 0
        try:
            tensor, lengths = tensor_of(values, pad)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(
                f"The column {column!r} of the {inputs.purpose} data{name} is no tensor: {error}"
            ) from error
        tensors[column] = tensor
        if column == "input_ids" and lengths is not None and inputs.takes("attention_mask"):
            mask = torch.arange(tensor.shape[1]) < torch.tensor(lengths)[:, None]
            tensors.setdefault("attention_mask", mask.long())
    return tensors


def tensor_of(values: Any, pad: int) -> tuple[Tensor, list[int] | None]:
    """Values as one tensor; sequences of different length are padded, and their lengths are told."""
    lengths = None
    if isinstance(values, Tensor):
        tensor = values.detach() if values.requires_grad else values
    elif isinstance(values, np.ndarray) and values.dtype != object:
        tensor = torch.from_numpy(np.ascontiguousarray(values))
    else:
        rows = [v if isinstance(v, Tensor) else torch.as_tensor(np.asarray(v)) for v in values]
        if len({row.shape for row in rows}) > 1 and all(row.ndim == 1 for row in rows):
            lengths = [len(row) for row in rows]
            tensor = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
        else:
            tensor = torch.stack(rows)
    if tensor.dtype == torch.float64:
        tensor = tensor.float()
    elif tensor.dtype in (torch.int8, torch.int16, torch.int32):
        tensor = tensor.long()  # what embeddings take
    return tensor, lengths
