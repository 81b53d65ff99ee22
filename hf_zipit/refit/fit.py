"""What all who solve a part of one refit share: the values so far, the rows, the targets and the settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from torch import Tensor

from hf_zipit.config import RefitConfig
from hf_zipit.maps.space_map import Alignment
from hf_zipit.refit.graph import Site
from hf_zipit.refit.rows import Picked, Rows
from hf_zipit.refit.targets import Targets
from hf_zipit.refit.values import Values
from hf_zipit.symmetry.ops import shape_of
from hf_zipit.symmetry.spec import MergeSpec


@dataclass(frozen=True)
class Fit:
    """One refit.

    Attributes:
        tasks: in the order of the experts.
        spec, alignment: the spaces, and each one's maps.
        values: what the ops of the forward pass give.
        rows: which of them enter a regression; `targets`: what they should be.
        all_reduce: sums a tensor over all processes.
    """

    tasks: tuple[str, ...]
    spec: MergeSpec
    alignment: Alignment
    config: RefitConfig
    values: Values
    rows: Rows
    targets: Targets
    all_reduce: Callable[[Tensor], Tensor]

    def pick(self, site: Site, b: int) -> tuple[Picked, Tensor]:
        """The rows of a site's value that enter its regression, and their weights."""
        shape = self.values.merged[site.weight].shape
        inputs = prod(shape[1:]) if site.kind in ("linear", "conv") else shape[-1]
        return self.rows.pick(shape_of(site.stream or site.output), b, site.channel_axis, inputs)

    def write(self, site: Site, weight: Tensor, bias: Tensor | None = None) -> None:
        """Put a solution into the merged model; where a site has no bias, none is written."""
        tensors = self.values.merged
        for name, solution in ((site.weight, weight), (site.bias, bias)):
            if name is not None and solution is not None:
                tensors[name] = solution.reshape(tensors[name].shape).to(tensors[name].dtype)
