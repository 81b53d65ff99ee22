"""Combining as a stage of `merge`: by weights alone, with statistics that were gathered before, or layer by layer."""

from __future__ import annotations

from torch import Tensor

from hf_zipit.combine.combine import combine_trunk
from hf_zipit.data.calibration import Calibration
from hf_zipit.layerwise.walk import LayerwiseWalk
from hf_zipit.maps.space_map import Alignment
from hf_zipit.observation.statistics import LayerStatistics
from hf_zipit.planning.plan import Plan
from hf_zipit.registry import RULES


def combined_trunk(
    planned: Plan,
    maps: Alignment,
    calibration: Calibration | None = None,
    statistics: LayerStatistics | None = None,
) -> dict[str, Tensor]:
    """The merged tensors of the trunk, see `combine_trunk`; of a layerwise rule, see `walk.py`.

    Raises:
        DataError: a layerwise rule has no calibration data, or less of it than there are processes.
    """
    if RULES.get(planned.config.combine).layerwise and planned.cut.trunk:
        if calibration is None:
            return LayerwiseWalk(planned, maps, calibration).run()
        return calibration.while_it_fits(lambda: LayerwiseWalk(planned, maps, calibration).run())
    return combine_trunk(planned, maps, statistics)
