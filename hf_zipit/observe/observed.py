"""Moments for merges: known ones, or those of one look at the data; for many merges of the same experts, too.

Every look is taken once, for the deepest merge: shallower ones look at fewer of the same places (`Moments.at`).
Methods that rotate the residual stream look at the experts with their norms folded, which compute the same but have
other features inside; those are observed apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_zipit.errors import DataError
from hf_zipit.experts.fingerprint import fingerprint_experts
from hf_zipit.observe import Moments, observe
from hf_zipit.observe.record import probe_name
from hf_zipit.planning.plan import Plan, fold_experts, make_plan


class Observed:
    """The moments of the experts, gathered when a plan first needs them.

    Args:
        experts: the models by task.
        calibration: unlabelled data; may be None where no plan needs moments.
        depths: all depths that are merged at.
        known: moments of the experts as they are, or their file, to be used in place of observing.
        settings: arguments of `observe`.

    Raises:
        DataError: if the known moments are of other experts.
    """

    def __init__(
        self,
        experts: Mapping[str, PreTrainedModel],
        calibration: Any,
        depths: Sequence[float | str],
        known: Moments | str | Path | None = None,
        **settings: Any,
    ) -> None:
        self.experts, self.calibration, self.depths, self.settings = experts, calibration, depths, settings
        self._found: dict[bool, Moments] = {}
        if known is not None:
            loaded = known if isinstance(known, Moments) else Moments.load(known)
            self._found[False] = loaded.of(fingerprint_experts(experts))

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
                raise DataError("a method looks at what the experts compute: give a little unlabelled data")
            plans = [make_plan(self.experts, depth, folding=folding) for depth in self.depths]
            deepest = max(plans, key=lambda plan: plan.cut.depth)
            experts = fold_experts(self.experts, deepest)
            self._found[folding] = observe(deepest.spec, experts, self.calibration, **self.settings)
        return self._found[folding]


def moments_for(
    experts: Mapping[str, nn.Module],
    planned: Plan,
    calibration: Any,
    known: Moments | str | Path | None,
    save: str | Path | None,
    **settings: Any,
) -> Moments | None:
    """Moments where the method needs them: known ones if given, else gathered from the calibration data."""
    if not planned.passes or not planned.spec.probes:
        return None
    if known is not None:
        loaded = known if isinstance(known, Moments) else Moments.load(known)
        own = loaded.of(fingerprint_experts(experts), "The moments" if loaded is known else f"The moments in {known}")
        # Those of a deeper merge serve, too: this one looks at fewer places.
        products = planned.spec.products()
        return own.at({key: [probe_name(probe) for probe in probes] for key, probes in products.items()})
    if calibration is None:
        raise DataError("this method looks at what the experts compute: pass a little unlabelled data as calibration=")
    found = observe(planned.spec, experts, calibration, **settings)
    if save is not None:
        found.save(save)
    return found
