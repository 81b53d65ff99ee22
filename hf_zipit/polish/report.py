"""What polishing did, beside what the closed form had reached: the record of a training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from transformers import PreTrainedModel

from hf_zipit.schema import Plain


@dataclass(frozen=True)
class PolishReport(Plain):
    """A training.

    Attributes:
        steps: that were taken; `best`: the step whose weights were kept, 0 for those of the closed form.
        seed: of the held-out samples and of the order.
        samples: by task how many were learnt from, and how many were held out.
        loss: on the held-out samples, of the closed form and of what was kept.
        agreement: by task, the share of held-out answers that are the expert's, of the closed form and of what was
            kept; no task is in it that does not choose between classes or tokens.
        kind: what was learnt, a name of `hf_zipit.polish.kinds`.
    """

    steps: int
    best: int
    seed: int
    samples: Mapping[str, list[int]]
    loss: list[float]
    agreement: Mapping[str, list[float]]
    kind: str = "weights"

    @classmethod
    def of(cls, model: PreTrainedModel) -> PolishReport | None:
        """The report of a merged model; None if it was not polished."""
        saved = model.config.method.get("polished")
        return cls(**{f.name: saved[f.name] for f in fields(cls) if f.name in saved}) if saved else None


def rounded(report: PolishReport) -> dict[str, Any]:
    """Plain values for a configuration; losses and shares to six digits, which other machines give as well."""
    plain = report.to_dict()
    plain["loss"] = [round(value, 6) for value in report.loss]
    plain["agreement"] = {task: [round(value, 6) for value in pair] for task, pair in report.agreement.items()}
    return plain
