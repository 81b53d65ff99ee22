"""What the refit achieved, module by module: where a merge loses accuracy shows here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RefitReport:
    """Relative squared errors of the regressions.

    Attributes:
        tasks: the experts, in order.
        errors: per module, in execution order, and task: the squared error on that task's calibration samples over the
            variance of the target. 0 is perfect, 1 no better than a constant. A module that writes into a residual
            stream is measured at the stream.
    """

    tasks: tuple[str, ...]
    errors: Mapping[str, Mapping[str, float]]

    def to_dict(self) -> dict[str, Any]:
        return {module: dict(by_task) for module, by_task in self.errors.items()}

    def worst(self, count: int = 5) -> list[tuple[str, float]]:
        """The modules with the largest mean error."""
        means = {module: sum(e.values()) / max(len(e), 1) for module, e in self.errors.items()}
        return sorted(means.items(), key=lambda item: -item[1])[:count]
