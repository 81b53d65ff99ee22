"""How deep a merge may be for a model of a given size: the last blocks stay every task's own, as many as that allows.

Where it is known which task runs, residues keep more for the same size; see `docs/residues.md`.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from hf_zipit.errors import RecipeError, SpecError
from hf_zipit.planning.cut import cut_model, tower_lengths
from hf_zipit.planning.plan import count_parameters
from hf_zipit.symmetry.spec import MergeSpec


def depth_for_size(experts: Mapping[str, nn.Module], spec: MergeSpec, size: float, *, readouts: bool) -> float:
    """The least depth at which the merged model has at most `size` times the parameters of the first expert.

    Args:
        experts: the models by task.
        spec: their spec.
        size: the multiple.
        readouts: whether a refit adds maps where branches read the trunk.

    Raises:
        RecipeError: where the model is larger with all blocks merged; it says how large.
        SpecError: as `cut_model` does at depth 1.
    """
    first = next(iter(experts.values()))
    blocks = max(tower_lengths(spec), default=1)

    def times(merged: int) -> float:
        cut = cut_model(first, spec, merged / blocks)
        found = count_parameters(experts, cut.trunk_spec(spec), cut, readouts=readouts)
        return found["merged"] / found["expert"]

    whole = times(blocks)
    if whole > size:
        raise RecipeError(
            f"size is {size:g}; with all blocks merged, and what every task keeps of its own, the model is "
            f"{whole:.3f} times as large as one expert, so give that or more"
        )
    for merged in range(blocks):
        try:
            if times(merged) <= size:
                return merged / blocks
        except SpecError:  # a branch would read the trunk elsewhere than at the cut
            continue
    return 1.0
