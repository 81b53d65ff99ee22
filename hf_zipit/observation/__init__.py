"""What the experts' units do on a little unlabelled data: probes -> `Moments`, in one streaming pass."""

from hf_zipit.observation.moments import Moments
from hf_zipit.observation.observe import gather_moments, observe

__all__ = ["Moments", "gather_moments", "observe"]
