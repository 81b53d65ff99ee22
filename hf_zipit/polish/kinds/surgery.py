"""Representation surgery: what merging put into a task's features, taken away by a small network (arXiv 2402.02705).

For every task, behind the trunk, x becomes x - up(relu(down x)), learnt so that on the task's own samples it is what
its expert's own modules read: the loss is the mean absolute difference. With `blocks` the inputs of all blocks of the
trunk get such networks as well, and are compared there, too (arXiv 2410.14389). The trunk itself stays as it was
merged. Readout maps of the refit are the same layer without what is in between, solved instead of learnt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hf_zipit.combine.combine import generator_of
from hf_zipit.combine.options import above
from hf_zipit.correct.sites import block_inputs
from hf_zipit.maps.products import merged_length
from hf_zipit.maps.transform import unmerge_matrix
from hf_zipit.polish.distance import Apart, Distance, entering
from hf_zipit.polish.kind import Finished, Learnt, register
from hf_zipit.refit.answers import mean


@register(
    "surgery",
    about="a small network for each task that corrects its features (representation surgery, arXiv 2402.02705)",
    loss="mean absolute difference from the experts' features",
)
def surgery(done: Finished, *, rank: int = 16, blocks: bool = False) -> Learnt:
    """The networks.

    Args:
        rank: of each.
        blocks: one at the input of every block, too.

    Raises:
        RecipeError: a rank that is not above 0.
    """
    above("surgery", "rank", rank)
    merged, planned, maps = done.merged, done.planned, done.maps
    sites = list(block_inputs(planned.spec, planned.cut)) if blocks else []
    merged.add_surgery(
        rank, [{"module": s.module, "axis": s.axis, "size": merged_length(s.label, maps, planned.spec)} for s in sites]
    )
    merged.surgery.to(next(merged.parameters()).device)
    for name, parameter in merged.surgery.named_parameters():
        if name.endswith(".down"):
            drawn = torch.randn(parameter.shape, generator=generator_of(planned.config.seed, name))
            parameter.data.copy_(drawn / parameter.shape[1] ** 0.5)
    own = {
        site.module: [
            (site.axis, unmerge_matrix(maps, site.label, t, planned.spec).float()) for t in range(len(planned.tasks))
        ]
        for site in sites
    }
    parameters = {f"surgery.{name}": parameter for name, parameter in merged.surgery.named_parameters()}
    return Learnt(parameters, Features(done, own))


class Features(Distance):
    """The mean absolute difference of a task's features from its expert's, over the readouts and sites in the trunk.

    `sites`: by the path of a module in the trunk, whose first input is compared, the axis of its units and, by expert,
    U_t `[d, k]`.
    """

    def __init__(self, done: Finished, sites: Mapping[str, list[tuple[int, Tensor]]]) -> None:
        super().__init__(done.merged, done.planned, done.positions, 0.0)
        self.sites, self.tasks = sites, list(done.planned.tasks)

    def __call__(self, task: str, inputs: Mapping[str, Tensor]) -> Apart:
        paths, number = list(self.sites), self.tasks.index(task)
        with entering(self.experts[task], paths) as wanted, entering(self.merged.trunk, paths) as found:
            apart = super().__call__(task, inputs)
        off = [apart.loss]
        for path, by_expert in self.sites.items():
            axis, unmerge = by_expert[number]
            own = (found[path].movedim(axis, -1) @ unmerge.T.to(found[path])).movedim(-1, axis)
            off.append(self._off(own, wanted[path], inputs))
        return Apart(sum(off) / len(off), apart.agreed, apart.asked)

    def _loss(
        self,
        outputs: Sequence[tuple[str, Tensor, Tensor]],
        features: Sequence[tuple[Tensor, Tensor]],
        inputs: Mapping[str, Tensor],
        expert: nn.Module,
    ) -> Tensor:
        """Of features that are read, or of those that leave the trunk as they are."""
        pairs = features or [(found, wanted) for _, found, wanted in outputs]
        return sum(self._off(found, wanted, inputs) for found, wanted in pairs) / len(pairs)

    def _off(self, found: Tensor, wanted: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        off = (found.float() - wanted.float()).abs()
        weights = self._weights(inputs, wanted)
        return mean(off.mean(-1) if weights is not None else off, weights)
