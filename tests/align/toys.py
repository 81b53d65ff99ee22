"""Correlations and specs that need no model, for the tests of alignment and combining."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_zipit.symmetry.spec import MergeSpec, Space, Symmetry

VECTORS = Path(__file__).parents[1] / "vectors"


def vectors(name: str) -> dict[str, NDArray]:
    """Inputs and outputs of a published implementation."""
    with np.load(VECTORS / f"{name}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def correlation(*features: Tensor) -> Tensor:
    """The correlation `[T * d, T * d]` of the experts' features, each `[d, samples]`; zero for dead units."""
    x = torch.cat(features).double()
    x = x - x.mean(1, keepdim=True)
    covariance = x @ x.T / x.shape[1]
    std = covariance.diagonal().sqrt()
    return covariance / torch.outer(std, std).clamp(min=1e-7)


def partition(labels: Tensor | NDArray) -> set[frozenset[int]]:
    """The groups of a labelling, as sets of flat indices."""
    groups: dict[int, list[int]] = {}
    for unit, label in enumerate(torch.as_tensor(labels).flatten().tolist()):
        groups.setdefault(label, []).append(unit)
    return {frozenset(group) for group in groups.values()}


def spec_of(*spaces: Space, **fields) -> MergeSpec:
    return MergeSpec("Toy", {space.name: space for space in spaces}, fields.pop("axes", {}), **fields)


def space(name: str, size: int, *within: str, fixed: bool = False) -> Space:
    return Space(name, size, Symmetry.FIXED if fixed else Symmetry.PERMUTATION, within)
