"""Experts with quantised weights: dequantised where the library that quantised them is there, for integers cannot be
averaged. What is merged is the plain model that transformers makes of them, in float32.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_zipit.errors import ExpertError
from hf_zipit.experts.checkpoints import PLAIN
from hf_zipit.hub.reasons import first_line


def kind_of(config: PreTrainedConfig) -> str | None:
    """How the weights of a configuration are quantised; None where they are not."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    kind = found.get("quant_method") if isinstance(found, Mapping) else getattr(found, "quant_method", type(found))
    return str(getattr(kind, "value", kind))


def load_dequantised(
    model_class: type[PreTrainedModel], source: str, config: PreTrainedConfig, revision: str | None
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """The plain model of quantised weights in a folder or repo, and what `from_pretrained` tells of its tensors.

    Raises ExpertError if the library that they need is not there, or cannot dequantise them.
    """
    kind = kind_of(config)
    try:
        model, found = model_class.from_pretrained(
            source, config=config, revision=revision, output_loading_info=True, **PLAIN
        )
        return model.dequantize(torch.float32), {**found, "integer_keys": []}
    except Exception as error:  # each library in its own way
        raise ExpertError(
            f"the weights in {source} are quantised ({kind}) and could not be dequantised here ({first_line(error)}); "
            "install what they need, or save what `model.dequantize()` gives, and merge that"
        ) from error


def dequantised(task: str, model: nn.Module) -> nn.Module:
    """A loaded model as it is, or the plain copy of one with quantised weights.

    Raises ExpertError if its library cannot dequantise them.
    """
    if not getattr(model, "is_quantized", False):
        return model
    try:
        return copy.deepcopy(model).dequantize(torch.float32).eval()
    except Exception as error:  # each library in its own way
        raise ExpertError(
            f"the weights of the expert {task!r} are quantised ({kind_of(model.config)}) and could not be dequantised "
            f"({first_line(error)}); load it without quantisation"
        ) from error
