"""Attention layers of the trunk with more and narrower heads than the source class builds.

The weights of such a layer have their usual shapes; only how their outputs are cut into heads differs. The classes of
`transformers` cut by an attribute of the attention module, `view(..., -1, self.head_dim)`, so that another number
there is all it takes. Where a class does otherwise, nothing is cut: `refit/splitting.py` tries what the class
really computes before it plans with narrower heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from ..errors import ZipItError
from .trunk import module_under

HEAD_DIMS = ("head_dim", "attention_head_size", "key_value_proj_dim")
"""What attention modules call the width of a head,"""

COUNTS = ("num_heads", "num_attention_heads", "n_heads", "num_key_value_heads")
"""how many there are,"""

SCALES = ("scaling", "scale")
"""and what they multiply logits by, `head_dim ** -0.5`; where they keep it at all."""


def head_dim_name(module: nn.Module) -> str | None:
    """The attribute by which an attention module cuts heads; None where there is none."""
    return next((name for name in HEAD_DIMS if isinstance(getattr(module, name, None), int)), None)


POSITIONS = "position_embeddings"
"""The argument by which attention modules get the cosines and sines of a rotary embedding, `[..., head_dim]` each."""


@dataclass(frozen=True)
class HeadCut:
    """What a layer's heads become: their new width, and which of the old ones' rotary pairs they have, if any."""

    width: int
    pairs: list[int] | None = None


def pair_units(pairs: Sequence[int], width: int) -> list[int]:
    """The units of a head of `width` that are some of its rotary pairs: unit i turns with unit i + width / 2."""
    return [*pairs, *(pair + width // 2 for pair in pairs)]


def cut_heads(
    root: nn.Module, head_dims: Mapping[str, int], rotary_pairs: Mapping[str, Sequence[int]] | None = None
) -> None:
    """Give attention layers under `root` narrower heads, and more of them, of the same width together.

    `head_dims` holds the new width of a head by path; it divides the old one. `rotary_pairs` says which of the old
    heads' rotary pairs the new ones have, for layers that have a rotary embedding. Raises ZipItError if there is no
    attention layer under a path, or its heads cannot be cut so.
    """
    for path, new in head_dims.items():
        module = module_under(root, path, "head_dims")
        name = head_dim_name(module)
        if name is None:
            raise ZipItError(f"head_dims names '{path}', which does not say how wide its heads are.")
        old = getattr(module, name)
        if new < 1 or old % new:
            raise ZipItError(
                f"head_dims cuts the heads of '{path}' to {new}, which does not divide their width {old}."
            )
        setattr(module, name, new)
        for count in COUNTS:
            if isinstance(getattr(module, count, None), int):
                setattr(module, count, getattr(module, count) * (old // new))
        if any(isinstance(getattr(getattr(module, "config", None), count, None), int) for count in COUNTS):
            module.config = _MoreHeads(module.config, old // new)
        for scale in SCALES:
            if isinstance(getattr(module, scale, None), float):
                setattr(module, scale, getattr(module, scale) * (old / new) ** 0.5)
        if rotary_pairs and path in rotary_pairs:
            pairs = rotary_pairs[path]
            if len(pairs) * 2 != new or not all(0 <= pair < old // 2 for pair in pairs):
                raise ZipItError(f"rotary_pairs of '{path}' should be {new // 2} numbers below {old // 2}: {pairs}.")
            module.register_forward_pre_hook(partial(_turn_some, pair_units(pairs, old)), with_kwargs=True)


class _MoreHeads:
    """A configuration as one attention module sees it: with more heads, and all else as it is, later changes too."""

    def __init__(self, config: Any, times: int) -> None:
        self._config, self._times = config, times

    def __getattr__(self, name: str) -> Any:
        if name in ("_config", "_times"):  # while it is being copied
            raise AttributeError(name)
        value = getattr(self._config, name)
        return value * self._times if name in COUNTS and isinstance(value, int) else value


def _turn_some(
    units: list[int], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of an attention module with the cosines and sines of some units alone."""
    if POSITIONS not in kwargs:
        raise ZipItError(f"{type(module).__name__} is not given the {POSITIONS} that rotary_pairs are for.")
    return args, kwargs | {POSITIONS: tuple(part[..., units] for part in kwargs[POSITIONS])}
