"""What a training may change, by name: the kinds of `polish`.

A kind is a function

    kind(done, *, option=default, ...) -> Learnt

of a finished merge. It says which parameters are learnt, which loss is made smaller on each task's own samples, and
how parameters that are not the model's own become the model's. The loop, the held-out samples, the early stopping and
the report are the same for all (`loop.py`). The keyword-only parameters are the kind's options.

Invariants: as it is made, a kind leaves what the model computes as it was, to the bit; what is learnt last is never
worse on held-out samples than that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from hf_zipit.config import PolishConfig
from hf_zipit.errors import RecipeError
from hf_zipit.maps.space_map import Alignment
from hf_zipit.modeling import ZipItPreTrainedModel
from hf_zipit.planning.plan import Plan
from hf_zipit.polish.distance import Apart
from hf_zipit.refit.positions import Positions
from hf_zipit.registry import TRAININGS


@dataclass(frozen=True)
class Finished:
    """What a kind is given.

    Attributes:
        merged: the model, after all corrections; `planned`, `maps`: the merge that made it.
        positions: which positions count, and how much.
    """

    merged: ZipItPreTrainedModel
    planned: Plan
    maps: Alignment
    positions: Positions

    @property
    def config(self) -> PolishConfig:
        assert self.planned.config.polish is not None
        return self.planned.config.polish


@dataclass(frozen=True)
class Learnt:
    """What is learnt.

    Attributes:
        parameters: by name what AdamW changes.
        distance: the loss on samples of a task.
        through: the model's own parameters that are made from these, and need gradients for it.
        put: make them; of the step that is to come, None where nothing is drawn.
        pull: from their gradients those of `parameters`.
    """

    parameters: Mapping[str, nn.Parameter]
    distance: Callable[[str, Mapping[str, Tensor]], Apart]
    through: Sequence[nn.Parameter] = ()
    put: Callable[[int | None], None] = lambda step: None
    pull: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class PolishKind:
    """A registered kind.

    Attributes:
        name, function: its own.
        about: what it does, for cards: "the model was trained ... to ...", as in "all weights, to put out ...".
        loss: what is measured on held-out samples, for cards.
        needs_base: whether it goes on from task vectors.
        check: is given the plan and the options before any work, and raises what is wrong.
    """

    name: str
    function: Callable[..., Learnt]
    about: str
    loss: str
    needs_base: bool = False
    check: Callable[..., object] = lambda planned, **options: None


KindFunction = TypeVar("KindFunction", bound=Callable[..., Learnt])


def register(
    name: str,
    *,
    about: str,
    loss: str = "distance from the experts",
    needs_base: bool = False,
    check: Callable[..., object] = lambda planned, **options: None,
) -> Callable[[KindFunction], KindFunction]:
    """Decorator that makes a function a kind of training; see `PolishKind`."""

    def decorate(function: KindFunction) -> KindFunction:
        TRAININGS.add(name, PolishKind(name, function, about, loss, needs_base, check))
        return function

    return decorate


def check_polish(planned: Plan) -> None:
    """Raise RecipeError if a training goes on from task vectors, and there are none or a refit changes what they are.

    It is asked before any work. Raises also what the kind's own check does.
    """
    config: Any = planned.config.polish
    if config is None:
        return
    kind = TRAININGS.get(config.kind)
    if kind.needs_base and not planned.bases:
        raise RecipeError(
            f"polish={config.kind!r} learns how much of the experts' task vectors counts; choose a rule that reads a "
            "base, such as combine='task-arithmetic', and pass base="
        )
    if kind.needs_base and planned.config.refit is not None:
        raise RecipeError(
            f"polish={config.kind!r} goes on from task vectors, and refitted weights are no sum of these; pass "
            "refit=False"
        )
    kind.check(planned, **config.options)
