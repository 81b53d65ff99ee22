"""Alignment of a whole model: which method every movable space gets, and one map for each of them.

Matchers of one space are run by the solver (`solver.py`). A whole-network method sees what they have fixed.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from hf_zipit.align.heads import holds_blocks
from hf_zipit.align.method import Network
from hf_zipit.align.procrustes import rotate_streams, rotating
from hf_zipit.align.solver import Choice, Solver
from hf_zipit.config import MergeConfig, Residual, check_residual
from hf_zipit.errors import DataError, RecipeError
from hf_zipit.maps.space_map import Map
from hf_zipit.planning.cut import NOT_IN_TRUNK
from hf_zipit.registry import METHODS
from hf_zipit.symmetry.spec import MergeSpec, ProductKey, Space, factors
from hf_zipit.symmetry.sums import without_sums

logger = logging.getLogger(__name__)

Overrides = Mapping[str, "str | Mapping[str, Any]"]


def align(
    spec: MergeSpec,
    correlations: Mapping[ProductKey, Tensor],
    experts: int,
    method: str,
    *,
    options: Mapping[str, Any] | None = None,
    residual: Residual = "match",
    overrides: Overrides | None = None,
    weights: Sequence[Mapping[str, Tensor]] = (),
    widenable: frozenset[str] = frozenset(),
    covariances: Mapping[ProductKey, Tensor] | None = None,
    seed: int = 0,
) -> dict[str, Map]:
    """Align the experts in every movable space.

    Args:
        spec, correlations, experts, weights, widenable, covariances, seed: see `Network`.
        method, options: see `MergeConfig`.
        residual: `"identity"` leaves the residual streams (`residual_spaces`) as they are, `"orthogonal"` rotates
            those that allow it (a folded model's) by Procrustes, from activations or, where the method reads none,
            from weights.
        overrides: for spaces whose name matches a pattern (as in `fnmatch`), another method: its name, or a mapping of
            `method` and its options. The first pattern that matches decides, also over `residual`.

    Returns:
        One map for every movable space, in the spec's order, but for rotary ones that no method rotates: without a map
        they keep their units. Heads are always matched one-to-one.

    Raises:
        RecipeError: an unknown method, option or `residual`, or a pattern that matches nothing.
        DataError: correlations of another size than the spec's, or not finite.
    """
    spec, weights = without_sums(spec, weights)
    default = _default(method, options or {})
    choices = _choices(spec, default, residual, overrides or {})
    _check(spec, correlations, experts)
    _check_widths(resized(choices, spec, experts), widenable, spec)
    kept = [name for name, choice in choices.items() if _keeps_units(choice, spec.spaces[name])]
    spec = spec.with_fixed(kept, "its method does not rotate pairs")
    choices = {name: choice for name, choice in choices.items() if name not in kept}
    network = Network(spec, experts, correlations, weights, {}, widenable, covariances or {}, seed)
    rotated = _rotations(network, choices, default) if residual == "orthogonal" else {}
    solver = Solver(network, rotated)
    left = {name: _fitting(choice, spec.spaces[name]) for name, choice in choices.items() if name not in rotated}
    if default.method.scope == "network":
        solver.solve({name: choice for name, choice in left.items() if choice is not default})
        solver.maps |= default.method.function(replace(network, fixed_maps=solver.maps), **default.options)
    else:
        solver.solve(left)
    return {name: solver.maps[name] for name in choices if name in solver.maps}


def check_settings(
    spec: MergeSpec, experts: int, config: MergeConfig, widenable: Callable[[], frozenset[str]] = frozenset
) -> frozenset[str]:
    """Raise what `align` would raise about its settings, before any data is read.

    Every matcher is run once on the smallest space that it is for, with units that resemble nothing, a whole-network
    method on a network of one tiny space: values of options that are out of range show there.

    Args:
        spec, experts: as in `align`.
        config: the settings of the merge.
        widenable: finds out which spaces may have another width; asked only where a method is to change one's.

    Returns:
        What the methods that are used read: see `Method.needs`.
    """
    default = _default(config.method, config.options)
    dry_run_done: list[Choice] = []
    choices = _choices(spec, default, config.residual, config.overrides)
    for name, choice in sorted(choices.items(), key=lambda item: spec.spaces[item[0]].size):
        if choice not in dry_run_done:
            dry_run_done.append(choice)
            choice.dry_run(experts, spec.spaces[name].size)
    if default.method.scope == "network" and default not in dry_run_done:
        default.dry_run(experts)
    if config.residual == "orthogonal" and not set(rotating(spec)) & set(residual_spaces(spec)):
        logger.info(
            "residual='orthogonal': %s has no norm that could be folded out of its residual stream, which is matched "
            "unit by unit instead.",
            spec.architecture,
        )
    needs = frozenset().union(*(choice.method.needs for choice in choices.values()))
    if changed := resized(choices, spec, experts):
        _check_widths(changed, widenable(), spec)
        needs |= {"widths"}
    if config.residual == "orthogonal":
        needs |= {"covariances"} if "moments" in needs else {"weights"}
    return needs


def wants_folding(method: str, residual: Residual = "match", overrides: Overrides | None = None) -> bool:
    """Whether these settings want the norms folded into their readers, so that streams can be rotated."""
    used = [METHODS.get(method), *(override_choice(*override).method for override in (overrides or {}).items())]
    return residual == "orthogonal" or any(entry.folds for entry in used)


def residual_spaces(spec: MergeSpec) -> tuple[str, ...]:
    """The residual streams: free movable spaces that the weights of three or more modules write into.

    Not heads: query, key and value write into those, but as blocks, with a space of their own inside.
    """
    writers: dict[str, set[str]] = defaultdict(set)
    for parameter, labels in spec.axes.items():
        # One axis alone is a bias or a norm's scale, which changes a stream but does not write into it.
        if len(labels) > 1:
            for label in labels:
                for factor in factors(label):
                    if not factor.dual:
                        writers[factor.space].add(parameter.rpartition(".")[0])
    outer = {name for space in spec.spaces.values() for name in space.within}
    free = (name for name, s in spec.spaces.items() if spec.movable(name) and not s.within and name not in outer)
    return tuple(name for name in free if len(writers[name]) >= 3)


def _default(method: str, options: Mapping[str, Any]) -> Choice:
    """The method of the whole model."""
    choice = Choice.of(method, options)
    if isinstance(size := options.get("size"), int):
        raise RecipeError(
            f"The option size of {method!r} is {size}, a number of units; for the whole model it must be a share of "
            "every space, such as 1.0. A number of units is for one space, in an override."
        )
    return choice


def resized(choices: Mapping[str, Choice], spec: MergeSpec, experts: int) -> list[str]:
    """The spaces that get more or fewer merged units than an expert has. (Heads are matched one-to-one.)"""
    products = spec.products()
    return [
        name
        for name, choice in choices.items()
        if choice.changes_width(spec.spaces[name].size, experts) and not holds_blocks(name, spec, products)
    ]


def _check_widths(names: Sequence[str], widenable: frozenset[str], spec: MergeSpec) -> None:
    if stuck := [name for name in names if name not in widenable]:
        more = f" and {len(stuck) - 1} more spaces" if len(stuck) > 1 else ""
        able = [name for name in spec.spaces if name in widenable]
        allowed = f"it allows that of {', '.join(able[:3])}{' and others like them' * (len(able) > 3)}"
        raise RecipeError(
            f"The option size changes the width of {stuck[0]}{more}, with which {spec.architecture} would no longer "
            f"compute what its experts do; {allowed}: give size in overrides for those."
        )


def _choices(spec: MergeSpec, default: Choice, residual: Residual, overrides: Overrides) -> dict[str, Choice]:
    """The method of every movable space."""
    check_residual(residual)
    choices = {name: default for name in spec.spaces if spec.movable(name)}
    if residual == "identity":
        choices |= {name: Choice.of("identity", {}) for name in residual_spaces(spec)}
    for pattern, override in reversed(overrides.items()):  # the first pattern has the last word
        choice = override_choice(pattern, override)
        matched = [name for name in spec.spaces if fnmatchcase(name, pattern)]
        movable = [name for name in matched if name in choices]
        # A pattern may be meant for a deeper cut than this one.
        if not movable and not any(spec.spaces[name].frozen_by == NOT_IN_TRUNK for name in matched):
            raise RecipeError(f"The override for {pattern!r} matches no movable space; `hf-zipit inspect` lists them.")
        choices |= dict.fromkeys(movable, choice)
    if default.method.scope == "network":
        _check_fixed(spec, {name: choice for name, choice in choices.items() if choice is not default})
    return choices


def _keeps_units(choice: Choice, space: Space) -> bool:
    """Whether a method is not for a space that allows rotations of its pairs and nothing else."""
    return space.symmetry.in_pairs and space.symmetry < choice.method.least


def _fitting(choice: Choice, space: Space) -> Choice:
    """`permute` in place of a matcher that asks for more symmetry than a space has."""
    too_much = choice.method.scope == "space" and space.symmetry < choice.method.least
    return Choice.of("permute", {}) if too_much else choice


def _rotations(network: Network, choices: Mapping[str, Choice], default: Choice) -> dict[str, Map]:
    """The rotations of the residual streams that allow them and that no override decides."""
    spec = network.spec
    names = [n for n in residual_spaces(spec) if n in rotating(spec) and choices[n] is default]
    if default.method.folds or not names:
        return {}
    if network.covariances:
        return rotate_streams(spec, network.covariances, network.experts, names)
    # Without data a stream's rotation depends on the maps of everything that reads and writes it.
    found = METHODS.get("circuits").function(network)
    return {name: found[name] for name in names}


def override_choice(pattern: str, override: str | Mapping[str, Any]) -> Choice:
    """The method that an override names for the spaces that fit its pattern.

    Raises:
        RecipeError: it names none, or one that aligns whole networks, or an option that the method does not have.
    """
    if not isinstance(override, (str, Mapping)):
        raise RecipeError(
            f"The override for {pattern!r} is {override!r}; it must be a method's name or a mapping of `method` and "
            "its options."
        )
    settings = {"method": override} if isinstance(override, str) else dict(override)
    if "method" not in settings:
        raise RecipeError(f"The override for {pattern!r} names no method; give it as 'method'.")
    choice = Choice.of(settings.pop("method"), settings)
    if choice.method.scope == "network":
        raise RecipeError(f"{choice.method.name!r} aligns whole networks; it cannot be used on {pattern!r} alone.")
    return choice


def _check_fixed(spec: MergeSpec, fixed: Mapping[str, Choice]) -> None:
    """What is matched before a whole-network method runs must not live within what that method will match."""
    for name, choice in fixed.items():
        outer = [other for other in spec.spaces[name].within if spec.movable(other) and other not in fixed]
        if "moments" in choice.method.needs and outer:
            raise RecipeError(f"{name} cannot be matched before {outer[0]}, which it lives within; override it too.")


def _check(spec: MergeSpec, correlations: Mapping[ProductKey, Tensor], experts: int) -> None:
    for key, correlation in correlations.items():
        size = experts * spec.size(key)
        if tuple(correlation.shape) != (size, size):
            raise DataError(
                f"The correlations of {' x '.join(key)} are {list(correlation.shape)} where {experts} experts need "
                f"[{size}, {size}]; observe these experts again."
            )
        if not torch.isfinite(correlation).all():
            raise DataError(f"The correlations of {' x '.join(key)} are not finite; an expert's activations are not.")
