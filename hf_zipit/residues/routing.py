"""Routers, by name: how a merged model with residues finds out what a sample needs where nobody names its task.

A router is a function

    router(merged, planned, maps, calibration, *, option=default, ...) -> None

that gives a merged model, which has its residues, what it needs to find out. Its keyword-only parameters are its
options. What runs with the model is in `hf_zipit.modeling`: a saved model runs without what made it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from hf_zipit.data.calibration import Calibration
from hf_zipit.errors import DataError
from hf_zipit.maps.space_map import Alignment
from hf_zipit.modeling.base import ZipItPreTrainedModel
from hf_zipit.planning.plan import Plan
from hf_zipit.registry import ROUTERS

Function = TypeVar("Function", bound=Callable[..., None])


@dataclass(frozen=True)
class RouterKind:
    """A registered router.

    Attributes:
        name, function: its own.
        check: is given the plan and the options before any work, and raises what is wrong.
        by_task: whether it reads calibration data that comes by task.
        needs_origin: whether it is of task vectors: a base is then taken whatever the rule.
    """

    name: str
    function: Callable[..., None]
    check: Callable[..., object]
    by_task: bool = False
    needs_origin: bool = False


def register(
    name: str,
    *,
    check: Callable[..., object] = lambda planned, **options: None,
    by_task: bool = False,
    needs_origin: bool = False,
) -> Callable[[Function], Function]:
    """Decorator that makes a function a router; see `RouterKind`."""

    def decorate(function: Function) -> Function:
        ROUTERS.add(name, RouterKind(name, function, check, by_task, needs_origin))
        return function

    return decorate


def check_router(planned: Plan, calibration: Calibration | None) -> None:
    """Raise, where the config asks for a router, what it needs and is not there.

    Raises:
        DataError: there is no calibration data, or it does not say which task each sample is of.
        RecipeError, SpecError: as the router's own check.
    """
    config = planned.config.residues
    if config is None or config.router is None:
        return
    kind = ROUTERS.get(config.router)
    if kind.by_task and (calibration is None or not calibration.read(planned.experts).by_task):
        raise DataError("The router tells the tasks apart by unlabelled samples: give calibration data by task.")
    kind.check(planned, **config.router_options)


def add_router(merged: ZipItPreTrainedModel, planned: Plan, maps: Alignment, calibration: Calibration | None) -> None:
    """Give a merged model, which has its residues, a router, in place, where the config asks for one."""
    config = planned.config.residues
    if config is not None and config.router is not None:
        ROUTERS.get(config.router).function(merged, planned, maps, calibration, **config.router_options)
