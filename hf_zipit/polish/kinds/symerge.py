"""SyMerge: coefficients of the task vectors and the tasks' own last layers, towards the experts' answers.

After arXiv 2412.19098: the coefficients of every task and tensor are learnt together with the modules behind the
trunk, so that the merged model answers as each task's expert does on its unlabelled samples. The paper learns from
the experts' answers as labels; here it is the divergence from all that they say of the classes.
"""

from __future__ import annotations

from hf_zipit.polish.distance import Distance
from hf_zipit.polish.kind import Finished, Learnt, register
from hf_zipit.polish.vectors import Coefficients


@register(
    "symerge",
    about="the coefficients of its experts' task vectors and the tasks' own layers, to answer as its experts do "
    "(after SyMerge, arXiv 2412.19098)",
    needs_base=True,
)
def symerge(done: Finished, *, layerwise: bool = True) -> Learnt:
    """The coefficients and the tasks' own layers.

    Args:
        layerwise: one coefficient for every tensor, instead of one for all.
    """
    coefficients = Coefficients(done, layerwise)
    own = {name: p for name, p in done.merged.named_parameters() if not name.startswith("trunk.")}
    return Learnt(
        {"coefficients": coefficients.changes, **{name: p for name, p in own.items() if p.is_floating_point()}},
        Distance(done.merged, done.planned, done.positions, 0.0),
        coefficients.through,
        coefficients.put,
        coefficients.pull,
    )
