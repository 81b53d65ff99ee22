"""WEMoE's routers (arXiv 2402.00433, `wemoe.py`), learnt towards the experts' answers in place of sure ones."""

from __future__ import annotations

from functools import partial

from hf_zipit.polish.distance import Distance
from hf_zipit.polish.kind import Finished, Learnt, register
from hf_zipit.polish.mixtures import add_mixtures, check_mixable


@register(
    "wemoe-distilled",
    about="a router in every MLP that weighs its experts' task vectors for each sample, to answer as its experts do "
    "(after WEMoE, arXiv 2402.00433)",
    needs_base=True,
    check=partial(check_mixable, "wemoe-distilled"),
)
def wemoe_distilled(done: Finished, *, hidden: int = 0, rank: int = 0) -> Learnt:
    """The routers.

    Args:
        hidden: their units; 0 for as many as enter the MLP.
        rank: of the task vectors that they weigh; 0 for whole ones.
    """
    return Learnt(add_mixtures(done, hidden, rank), Distance(done.merged, done.planned, done.positions, 0.0))
