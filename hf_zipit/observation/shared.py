"""Moments for merges: known ones, or those of one pass over the data; for many merges of the same experts, too.

The data is run once, for the deepest merge: shallower ones read fewer of the same places (`Moments.at`). Methods that
rotate the residual stream read the experts with their norms folded, which compute the same but have other features
inside; those are observed apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel

from hf_zipit.data.calibration import Calibration
from hf_zipit.errors import DataError
from hf_zipit.experts.fingerprint import fingerprint_experts
from hf_zipit.observation.moments import Moments
from hf_zipit.observation.observe import observe
from hf_zipit.observation.record import probe_name
from hf_zipit.planning.plan import Plan, make_plan


class SharedMoments:
    """The moments of the experts, gathered when a plan first needs them.

    Args:
        experts: the models by task.
        calibration: unlabelled data; may be None where no plan needs moments.
        depths: all depths that are merged at.
        known: moments of the experts as they are, or their file, to be used in place of observing.

    Raises:
        DataError: if the known moments are of other experts.
    """

    def __init__(
        self,
        experts: Mapping[str, PreTrainedModel],
        calibration: Calibration | None,
        depths: Sequence[float | str],
        known: Moments | str | Path | None = None,
    ) -> None:
        self.experts, self.calibration, self.depths = experts, calibration, depths
        self._found: dict[bool, Moments] = {}
        if known is not None:
            self._found[False] = loaded(known).of(fingerprint_experts(experts))

    def moments(self, planned: Plan) -> Moments | None:
        """Moments that serve a plan; None where it needs none.

        Raises:
            DataError: if there is no data to observe the experts on.
        """
        if not planned.passes:
            return None
        folding = bool(planned.spec.folds)
        if folding not in self._found:
            if self.calibration is None:
                raise DataError("a method reads what the experts compute: give a little unlabelled data")
            configs = [replace(planned.config, depth=depth) for depth in self.depths]
            plans = [make_plan(self.experts, config, folding=folding) for config in configs]
            self._found[folding] = observe(max(plans, key=lambda plan: plan.cut.depth), self.calibration)
        return self._found[folding]


def moments_for(
    planned: Plan, calibration: Calibration | None, known: Moments | str | Path | None = None
) -> Moments | None:
    """Moments where the method needs them: known ones if given, else gathered from the calibration data.

    Raises:
        DataError: if the known moments are of other experts, or there is nothing to gather them from.
    """
    if not planned.passes or not planned.spec.probes:
        return None
    if known is not None:
        found = loaded(known)
        own = found.of(
            fingerprint_experts(planned.folded), "The moments" if found is known else f"The moments in {known}"
        )
        # Those of a deeper merge serve, too: this one reads fewer places.
        products = planned.spec.products()
        return own.at({key: [probe_name(probe) for probe in probes] for key, probes in products.items()})
    if calibration is None:
        raise DataError("this method reads what the experts compute: pass a little unlabelled data as calibration=")
    return observe(planned, calibration)


def loaded(moments: Moments | str | Path) -> Moments:
    """Moments themselves, or those of a file."""
    return moments if isinstance(moments, Moments) else Moments.load(moments)
