"""Experts with quantised weights: dequantised where the library that quantised them is there, for integers cannot be
averaged. What is merged is the plain model, in float32: the one that transformers makes of them where it can
(bitsandbytes), else the one whose layers are read off the quantised ones (GPTQ, AWQ, torchao, compressed-tensors).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

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
            source, config=at_once(config), revision=revision, output_loading_info=True, **PLAIN
        )
        return plain_model(model), {**found, "integer_keys": []}
    except Exception as error:  # each library in its own way
        raise ExpertError(
            f"the weights in {source} are quantised ({kind}) and could not be dequantised here ({first_line(error)}); "
            "install what they need, or save what `model.dequantize()` gives, and merge that"
        ) from error


def at_once(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration with which libraries that can do so dequantise while they load (compressed-tensors, FP8)."""
    known = AUTO_QUANTIZATION_CONFIG_MAPPING.get(str(kind_of(config)))
    if known is not None and "dequantize" in signature(known).parameters:
        config = copy.deepcopy(config)
        config.quantization_config = {**dict(config.quantization_config), "dequantize": True}
    return config


def dequantised(task: str, model: nn.Module) -> nn.Module:
    """A loaded model as it is, or the plain copy of one with quantised weights.

    Raises ExpertError if its library cannot dequantise them.
    """
    if not getattr(model, "is_quantized", False):
        return model
    try:
        return plain_model(copy.deepcopy(model)).eval()
    except Exception as error:  # each library in its own way
        raise ExpertError(
            f"the weights of the expert {task!r} are quantised ({kind_of(model.config)}) and could not be dequantised "
            f"({first_line(error)}); load it without quantisation"
        ) from error


def plain_model(model: PreTrainedModel) -> PreTrainedModel:
    """The model without quantisation, in float32; `model` is of no use afterwards.

    Raises whatever the library that quantised it does.
    """
    if getattr(model, "hf_quantizer", None) is None:  # its weights were dequantised when they were loaded
        return model.float()
    try:
        return model.dequantize(torch.float32)
    except NotImplementedError:  # of most libraries
        return read_off(model)


@torch.no_grad()
def read_off(model: PreTrainedModel) -> PreTrainedModel:
    """A plain model of the same class that computes what a quantised one does, in float32.

    A layer that holds other tensors than a plain one is a linear map still, and what it makes of the unit vectors is
    its weight. A tensor of a library's own type can dequantise itself. The rest is copied.
    """
    config = copy.deepcopy(model.config)
    del config.quantization_config
    with no_init_weights():
        plain = type(model)(config).float()
    for name, module in plain.named_modules():
        given = model.get_submodule(name)
        if isinstance(module, (nn.Linear, Conv1D)) and shapes(given) != shapes(module):
            unit = torch.eye(given.in_features, dtype=model.dtype, device=model.device)
            bias = given(torch.zeros_like(unit[:1]))[0].float()
            weight = given(unit).float() - bias
            module.weight.copy_(weight.T if isinstance(module, nn.Linear) else weight)
            if module.bias is not None:
                module.bias.copy_(bias)
            continue
        for own, tensor in given.named_parameters(recurse=False):
            getattr(module, own).copy_(as_plain(tensor))
        for own, buffer in given.named_buffers(recurse=False):
            setattr(module, own, buffer.clone())
    plain.tie_weights()
    return plain.eval()


def shapes(module: nn.Module) -> dict[str, torch.Size]:
    """The shapes of a module's own parameters and buffers, by name."""
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return {name: tensor.shape for name, tensor in own}


def as_plain(tensor: Tensor) -> Tensor:
    """The values of a parameter, whose type may be a library's own."""
    return tensor if type(tensor) in (nn.Parameter, Tensor) else tensor.dequantize()
