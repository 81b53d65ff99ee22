"""AdaMerging: how much every task vector counts, learnt from unlabelled data (arXiv 2310.02575).

The coefficients, one for every task and tensor, are those with which the merged model is surest of its answers to the
tasks' own samples: the mean entropy of its predictions is made smaller. They start from the merge: after
`combine="task-arithmetic"` that is AdaMerging, after `"ties"`, whose trimmed and elected task vectors it then takes,
AdaMerging++; after any other rule on task vectors they are added to its result.
"""

from __future__ import annotations

from hf_zipit.polish.distance import Entropy
from hf_zipit.polish.kind import Finished, Learnt, register
from hf_zipit.polish.vectors import Coefficients


@register(
    "adamerging",
    about="the coefficients of its experts' task vectors, to be sure of its answers (AdaMerging, arXiv 2310.02575)",
    loss="entropy of the answers",
    needs_base=True,
)
def adamerging(done: Finished, *, layerwise: bool = True) -> Learnt:
    """The coefficients.

    Args:
        layerwise: one for every tensor, instead of one for all.

    Raises:
        RecipeError: the model does not choose between classes or tokens.
    """
    coefficients = Coefficients(done, layerwise)
    return Learnt(
        {"coefficients": coefficients.changes},
        Entropy(done.merged, done.planned, done.positions, 0.0),
        coefficients.through,
        coefficients.put,
        coefficients.pull,
    )
