"""Where a branch leaves the trunk: U_t becomes the linear map that best reconstructs expert t's own features.

For a linear head that is the regression on its logits.
"""

from __future__ import annotations

from torch import Tensor, fx

from hf_zipit.errors import SpecError
from hf_zipit.maps.transform import unmerge_matrix
from hf_zipit.planning.cut import Cut, ReadPoint
from hf_zipit.refit.fit import Fit
from hf_zipit.refit.graph import Program
from hf_zipit.refit.regression import Gram, ridge
from hf_zipit.refit.store import MERGED

Readouts = dict[ReadPoint, list[tuple[Tensor, Tensor]]]
"""Per entry or exit and task `(weight [d, k], bias [d])`: from merged units to the expert's own."""


def find_readouts(program: Program, cut: Cut) -> dict[ReadPoint, fx.Node]:
    """The node whose value each entry or exit reads.

    Raises:
        SpecError: if an entry reads nothing of the trunk.
    """
    readouts = {}
    for entry in cut.entries:
        node = program.value_read_by(entry.target, entry.axis + 1)
        if node is None:
            raise SpecError(f"nothing of the trunk enters {entry.target}; this model cannot be refitted at this depth")
        readouts[entry] = node
    return readouts | {entry: program.outputs[entry.target] for entry in cut.exits}


def solve_readout(fit: Fit, entry: ReadPoint, node: fx.Node) -> list[tuple[Tensor, Tensor]]:
    """For every task the map from the merged units to the expert's own, on the task's own samples."""
    found = []
    for t in fit.values.experts:
        prior = unmerge_matrix(fit.alignment, entry.label, t, fit.spec)
        gram = Gram(prior.shape[1], prior.shape[0], prior)
        for b, batch in enumerate(fit.values.batches):
            if batch.task not in (None, t):
                continue
            x, y = (fit.values.of(node, who, b).movedim(entry.axis, -1) for who in (MERGED, t))
            gram.add(x.flatten(0, -2), y.flatten(0, -2), fit.rows.weights(y.shape, b, -1))
        found.append(ridge(gram.reduce(fit.all_reduce), prior, fit.config.ridge))
    return found
