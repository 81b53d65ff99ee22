"""Models of other sizes: an expert's class with the merged model's shapes and heads, of which programs are made."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypeVar

from torch import nn

from hf_zipit.maps.products import merged_length
from hf_zipit.maps.space_map import Alignment
from hf_zipit.modeling.head_dims import cut_heads
from hf_zipit.modeling.trunk import resize
from hf_zipit.symmetry.spec import MergeSpec, product_key

Model = TypeVar("Model", bound=nn.Module)


def resized_copy(model: Model, shapes: Mapping[str, list[int]], head_dims: Mapping[str, int]) -> Model:
    """A copy with other shapes and heads; the tensors whose shapes stay are the model's own."""
    tensors = [*model.parameters(), *model.buffers()]
    other = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    resize(other, dict(shapes))
    cut_heads(other, head_dims)
    return other


def merged_shapes(spec: MergeSpec, alignment: Alignment) -> dict[str, list[int]]:
    """The shapes of all tensors that have a space of another size in the merged model, those of the branches too."""
    resized = {name for name, space_map in alignment.items() if space_map.size != spec.spaces[name].size}
    return {
        name: [merged_length(label, alignment, spec) for label in labels]
        for name, labels in spec.axes.items()
        if any(space in resized for label in labels for space in product_key(label))
    }
