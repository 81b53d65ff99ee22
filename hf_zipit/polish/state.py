"""The state of a training, in memory and in a file: tensors as safetensors, the rest as JSON in its header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_zipit.errors import RecipeError
from hf_zipit.files import replacing

FILE = "polish.safetensors"


@dataclass
class Progress:
    """How far a training is.

    Attributes:
        step: how many steps were taken; `best`: the one whose weights are the best so far.
        losses, agreements: on the held-out samples, by step; the agreement by task.
    """

    step: int = 0
    best: int = 0
    losses: dict[int, float] = field(default_factory=dict)
    agreements: dict[int, dict[str, float]] = field(default_factory=dict)

    def add(self, loss: float, agreement: dict[str, float]) -> bool:
        """Note what was measured after a step; whether it is the best so far."""
        self.losses[self.step], self.agreements[self.step] = loss, agreement
        better = self.step == 0 or loss < self.losses[self.best]
        if better:
            self.best = self.step
        return better

    def waited(self) -> int:
        """How many measurements in a row were no better than the best."""
        return sum(step > self.best for step in self.losses)


def save_state(folder: str | Path, tensors: Mapping[str, Tensor], progress: Progress, fingerprint: str) -> None:
    """Write the state, whole or not at all; `fingerprint` says which training it is of."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    about = {"fingerprint": fingerprint, "progress": json.dumps(asdict(progress))}
    with replacing(Path(folder) / FILE) as beside:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, beside, about)


def load_state(folder: str | Path, fingerprint: str) -> tuple[dict[str, Tensor], Progress] | None:
    """The tensors and the progress that were saved; None where there are none.

    Raises RecipeError if they are of another training.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        about = file.metadata() or {}
    if about.get("fingerprint") != fingerprint:
        raise RecipeError(
            f"polish.checkpoint names {path}, which is the state of other experts, data or settings; name another "
            "folder, or delete the file to start again"
        )
    saved = json.loads(about["progress"])
    by_step = {name: {int(step): value for step, value in saved[name].items()} for name in ("losses", "agreements")}
    return load_file(path), Progress(saved["step"], saved["best"], **by_step)
