"""What the experts do on a little unlabelled data, each in one streaming pass: `Moments` of units for those who align,
`LayerStatistics` of layers for those who combine."""

from hf_zipit.observation.gather import gather_statistics
from hf_zipit.observation.moments import Moments
from hf_zipit.observation.observe import gather_moments, observe
from hf_zipit.observation.statistics import LayerStatistics

__all__ = ["LayerStatistics", "Moments", "gather_moments", "gather_statistics", "observe"]
