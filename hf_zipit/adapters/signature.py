"""Example inputs told from a model's signature and the sizes in its configuration: sound, video, series, boxes.

Each function returns the inputs of one kind, batch first, none where the model takes none of the kind.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from hf_zipit.adapters.fake_passes import KnownNumbers, quietly
from hf_zipit.errors import DataError

BATCH = 2  # larger than one: an axis of size one cannot be told from no axis
TOKENS = 7  # a prime, unlike any width: easy to recognise in an error
FRAMES = 64
"""Length of spectrograms whose configuration gives none."""

LARGEST = 2**27
"""Numbers in one example input: 6,600 pixels squared in colour."""

SAMPLES = 1920
"""Length of waveforms whose configuration gives none."""

GRIDS = {"image_grid_thw", "grid_thw", "image_sizes", "tgt_sizes", "pixel_attention_mask", "image_position_ids",
         "images_per_sample"}  # fmt: skip
"""Inputs that say how images were cut into patches; without them `pixel_values` of such a model mean nothing."""


GRID = "grid_thw"
"""How the names of inputs end that count an image's patches along time, height and width, `[images, 3]`."""

SHAPES = "spatial_shapes"
"""The input that counts an image's patches along height and width, `[images, 2]`; others are padding."""

KINDS = "mm_token_type_ids"
"""The input that says which tokens of a text stand for an image (1), `[texts, tokens]`."""

CUT = ("hidden_states", "pixel_values", "pixel_values_videos")
"""Inputs that hold patches where there is a grid."""


def first_of(configs: Collection[Any], *names: str, default: Any = None) -> Any:
    """The first setting by one of these names that a configuration has."""
    found = (getattr(config, name, None) for name in names for config in configs)
    return next((value for value in found if value is not None), default)


def parts(config: Any, *names: str) -> list[Any]:
    """A configuration and those of its parts by these names."""
    return [config, *(part for name in names if (part := getattr(config, name, None)) is not None)]


def sound(config: Any, accepted: Collection[str], generator: torch.Generator) -> dict[str, Tensor]:
    """Waveforms for `input_values`, or spectrograms for it or for `input_features`."""
    configs = parts(config, "audio_config", "encoder_config", "encoder")
    kernels = first_of(configs, "conv_kernel")
    mels = first_of(configs, "num_mel_bins", "feature_projection_input_dim", "n_mels", "input_feat_size")
    inputs = {}
    if "input_values" in accepted:
        if isinstance(kernels, (list, tuple)) and first_of(configs, "conv_stride") is not None:
            inputs["input_values"] = waveforms(kernels, first_of(configs, "conv_stride"), generator)
        elif mels is not None:
            inputs["input_values"] = _random(
                first_of(configs, "max_length", default=FRAMES), mels, generator=generator
            )
        elif (channels := first_of(configs, "audio_channels")) is not None:
            inputs["input_values"] = _random(channels, SAMPLES, generator=generator)
        else:
            inputs["input_values"] = _random(SAMPLES, generator=generator)
    if "input_features" in accepted:
        stacked = first_of(configs, "input_feat_per_channel")
        length = first_of(configs, "max_source_positions")
        if stacked is not None:
            shape = (FRAMES, stacked * first_of(configs, "input_channels", default=1))
        elif mels is not None and length is not None and first_of(configs, "feature_projection_input_dim") is None:
            shape = (mels, 2 * length)  # Whisper's, before convolutions of stride two
        elif mels is not None:
            shape = (FRAMES, mels)
        else:
            return inputs
        inputs["input_features"] = _random(*shape, generator=generator)
    return inputs


def waveforms(kernels: Collection[int], strides: Collection[int], generator: torch.Generator) -> Tensor:
    """As many samples as give `TOKENS` after the convolutions."""
    samples = TOKENS
    for kernel, stride in zip(reversed([*kernels]), reversed([*strides]), strict=True):
        samples = (samples - 1) * stride + kernel
    return _random(samples, generator=generator)


def images(config: Any, generator: torch.Generator) -> dict[str, Tensor]:
    """Images, or clips where the configuration has a number of frames."""
    size = first_of([config], "image_size", default=64)
    height, width = (size, size) if isinstance(size, int) else tuple(size)[:2]
    channels, frames = first_of([config], "num_channels", default=3), first_of([config], "num_frames")
    return {"pixel_values": _random(*((frames,) if frames else ()), channels, height, width, generator=generator)}


def patches(config: Any, accepted: Collection[str], generator: torch.Generator) -> dict[str, Tensor]:
    """Images cut into square patches, `[images, patches, numbers]`, and their grids, for a model that is told them."""
    name = next((name for name in CUT if name in accepted), None)
    grid = next((name for name in (f"image_{GRID}", GRID) if name in accepted), None)
    side = first_of([config], "patch_size")
    if name is None or not isinstance(side, int):
        return {}
    frames = 1 if grid is None else first_of([config], "temporal_patch_size", default=1)
    numbers = first_of([config], "in_channels", "num_channels", "in_chans", default=3) * frames * side**2
    if grid is not None:
        along = 2 * first_of([config], "spatial_merge_size", default=1)
        grids = torch.tensor([[1, along, along]]).expand(BATCH, 3).contiguous()
        return {name: _random(along**2, numbers, generator=generator), grid: grids}
    if SHAPES in accepted:
        shapes = torch.tensor([[2, 3]]).expand(BATCH, 2).contiguous()
        seen = torch.ones(BATCH, 2 * 3, dtype=torch.long)
        return {name: _random(2 * 3, numbers, generator=generator), "pixel_attention_mask": seen, SHAPES: shapes}
    return {}


def grids(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the inputs that say how images were cut into `patches`, and which tokens stand for these."""
    found = {name: x for name, x in inputs.items() if name.endswith((GRID, SHAPES))}
    return found | {name: x for name, x in inputs.items() if found and name == KINDS}


def packed(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs as a model takes them: the patches of images with grids in one row, `[images * patches, numbers]`."""
    cut = any(name.endswith(GRID) for name in inputs)
    return {
        name: x.flatten(0, 1) if cut and name in CUT and isinstance(x, Tensor) and x.ndim == 3 else x
        for name, x in inputs.items()
    }


def videos(config: Any, accepted: Collection[str], generator: torch.Generator) -> dict[str, Tensor]:
    """Clips for `pixel_values_videos`, where a model takes nothing else."""
    configs = parts(config, "vision_config")[::-1]
    frames = first_of(configs, "num_frames", "frames_per_clip")
    if "pixel_values_videos" not in accepted or "pixel_values" in accepted or frames is None:
        return {}
    size = first_of(configs, "crop_size", "image_size", default=64)
    height, width = (size, size) if isinstance(size, int) else tuple(size)[:2]
    channels = first_of(configs, "num_channels", "in_chans", default=3)
    return {"pixel_values_videos": _random(frames, channels, height, width, generator=generator)}


def series(config: Any, accepted: Collection[str], generator: torch.Generator) -> dict[str, Tensor]:
    """The past of a time series, and its future where a decoder is fed with it."""
    if "past_values" not in accepted or not hasattr(config, "context_length"):
        return {}
    channels = getattr(config, "num_input_channels", None)
    if channels is not None:
        return {"past_values": _random(config.context_length, channels, generator=generator)}
    wide = () if getattr(config, "input_size", 1) == 1 else (config.input_size,)
    inputs = {}
    for when, steps in (
        ("past", config.context_length + max(getattr(config, "lags_sequence", None) or [0])),
        ("future", getattr(config, "prediction_length", None) or 1),
    ):
        inputs[f"{when}_values"] = _random(steps, *wide, generator=generator)
        inputs[f"{when}_time_features"] = _random(steps, getattr(config, "num_time_features", 0), generator=generator)
    inputs["past_observed_mask"] = torch.ones_like(inputs["past_values"])
    static = getattr(config, "num_static_categorical_features", 0)
    if static:
        inputs["static_categorical_features"] = torch.zeros(BATCH, static, dtype=torch.long)
    real = getattr(config, "num_static_real_features", 0)
    if real:
        inputs["static_real_features"] = _random(real, generator=generator)
    return {name: tensor for name, tensor in inputs.items() if name in accepted}


def boxes(accepted: Collection[str], tokens: int) -> dict[str, Tensor]:
    """Where every token stands on a page."""
    if "bbox" not in accepted:
        return {}
    return {"bbox": torch.tensor([1, 2, 3, 5]).expand(BATCH, tokens, 4).contiguous()}


def image_tokens(model: nn.Module, seen: Mapping[str, Tensor]) -> int | None:
    """How many image tokens a text needs for one image, None where the model does not tell; on fake tensors."""
    if not hasattr(model, "get_image_features"):
        return None
    try:
        with torch.no_grad(), quietly(), FakeTensorMode(allow_non_fake_inputs=True), KnownNumbers():
            found = model.get_image_features(**packed(seen))
    except Exception:  # whatever else it wants to know
        return None
    features = getattr(found, "pooler_output", found)
    rows = sum(x.shape[:-1].numel() for x in tree_leaves(features) if isinstance(x, Tensor) and x.ndim > 1)
    return rows // BATCH if rows and rows % BATCH == 0 else None


def _random(*shape: int, generator: torch.Generator) -> Tensor:
    """Raises DataError for sizes that no input has: they would take all memory."""
    if prod(shape) > LARGEST:
        raise DataError(
            f"the configuration asks for an example input of {' x '.join(map(str, shape))} numbers; correct its "
            "sizes, or pass example_inputs"
        )
    return torch.randn(BATCH, *shape, generator=generator)
