"""WEMoE: how much of every task vector counts in an MLP, for every sample anew (arXiv 2402.00433).

In every MLP of the trunk a small router reads what enters it and says, for a whole sample, what is added of each
expert's task vector; everything else stays as the rule merged it. The routers are learnt so that the model is sure of
its answers to the tasks' own samples. They start from the merge, which after `combine="task-arithmetic"` is the
paper's start with the rule's scale as its lambda.
"""

from __future__ import annotations

from functools import partial

from hf_zipit.polish.distance import Entropy
from hf_zipit.polish.kind import Finished, Learnt, register
from hf_zipit.polish.mixtures import add_mixtures, check_mixable


@register(
    "wemoe",
    about="a router in every MLP that weighs its experts' task vectors for each sample, to be sure of its answers "
    "(WEMoE, arXiv 2402.00433)",
    loss="entropy of the answers",
    needs_base=True,
    check=partial(check_mixable, "wemoe"),
)
def wemoe(done: Finished, *, hidden: int = 0, rank: int = 0) -> Learnt:
    """The routers.

    Args:
        hidden: their units; 0, as in the paper, for as many as enter the MLP.
        rank: of the task vectors that they weigh; 0, as in the paper, for whole ones.

    Raises:
        RecipeError: the model does not choose between classes or tokens.
    """
    return Learnt(add_mixtures(done, hidden, rank), Entropy(done.merged, done.planned, done.positions, 0.0))
