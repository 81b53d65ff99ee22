"""Looking at what the experts' units do on a little unlabelled data: probes -> `Moments`, in one streaming pass."""

from hf_zipit.data.sources import CalibrationBatch, calibration_batches
from hf_zipit.observe.moments import Moments
from hf_zipit.observe.observe import observe

__all__ = ["CalibrationBatch", "Moments", "calibration_batches", "observe"]
