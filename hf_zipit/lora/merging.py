"""`merge_adapters()`: LoRA adapters of one base become one, in their factors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_zipit.data.calibration import Calibration
from hf_zipit.errors import DataError, ExpertError, RecipeError
from hf_zipit.experts.loading import Experts, named
from hf_zipit.files.checks import unfit
from hf_zipit.lora.adapter import LoraAdapter, read_adapter
from hf_zipit.lora.factors import none_like, truncated
from hf_zipit.lora.inputs import projected_moments
from hf_zipit.lora.merged import MergedAdapters
from hf_zipit.lora.rule import Given, Updates
from hf_zipit.registry import LORA_RULES, check_options
from hf_zipit.steady import steady


@steady
def merge_adapters(
    adapters: Experts,
    calibration: Any = None,
    *,
    rule: str = "linear",
    options: Mapping[str, Any] | None = None,
    rank: int | None = None,
    base: PreTrainedModel | str | None = None,
    output_dir: str | Path | None = None,
    seed: int = 0,
    **reading: Any,
) -> MergedAdapters:
    """Merge LoRA adapters of one base in their factors, into one adapter; without training.

    The update of a layer, `[out, in]`, is never formed, and no base is loaded unless the rule reads data. Adapters may
    have different ranks, alphas and target modules; one that leaves a layer alone counts as zero there. Modules that
    they keep whole (`modules_to_save`) stay each task's own.

    Args:
        adapters: PEFT's LoRA adapters by task, two or more: folders, repo ids or `PeftModel`s.
        calibration: a little unlabelled data, as for `hf_zipit.merge`, for rules that read some (`ssr`).
        rule: `"linear"`, `"core-space"`, `"knots"` or `"ssr"`; see `hf_zipit.lora.rules`.
        options: the rule's own options, such as `{"combine": "ties"}`.
        rank: the most that the merged update of a layer may have; it is cut by its SVD. None: as the rule makes it.
        base: the model that all of them adapt, where they do not name it themselves.
        output_dir: a folder to save the result in.
        seed: of everything that is drawn.
        reading: `processor`, `columns`, `batch_size` and `memory_gb` of a `Calibration`.

    Returns:
        The merged adapter: `save_pretrained(folder)` for PEFT, `model()` for full weights.

    Raises:
        ExpertError: an adapter is of another kind, or they are of different bases.
        RecipeError: a setting is wrong.
        DataError: the rule reads data, and there is none or it cannot be used.
        OutputError: the folder cannot be written.
    """
    chosen = LORA_RULES.get(rule)
    known = check_options(rule, chosen.function, options or {})
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise RecipeError(f"rank is {rank!r}; it must be a whole number, at least 1, or None.")
    if chosen.needs_data and calibration is None:
        raise DataError(f"rule={rule!r} regresses on what layers read: pass a little unlabelled data as calibration=")
    if calibration is not None and not chosen.needs_data:
        with_data = [name for name in LORA_RULES if LORA_RULES.get(name).needs_data]
        raise RecipeError(f"rule={rule!r} reads no data; leave calibration= out, or choose one of {with_data}.")
    read = _read(adapters)
    _check_base(read, base)
    updates = aligned_updates(read)
    given = Given(tuple(read), seed)
    if chosen.needs_data:
        data = Calibration.of(calibration, **reading)
        given = Given(tuple(read), seed, projected_moments(read, updates, data))
    merged = chosen.merge(updates, given, known)
    merged = {name: truncated(found, rank or found.rank) for name, found in merged.items()}
    if wrong := next((name for name, found in merged.items() if not all(x.isfinite().all() for x in found)), None):
        raise ExpertError(f"the merged update of {wrong} is not finite; check the adapters' weights and the options")
    settings = {"rule": rule, "options": known, "rank": rank, "seed": seed}
    result = MergedAdapters(merged, read, settings, base)
    if output_dir is not None:
        result.save_pretrained(output_dir)
    return result


def _read(adapters: Experts) -> dict[str, LoraAdapter]:
    pairs = list(adapters.items() if isinstance(adapters, Mapping) else map(named, adapters))
    names = [task for task, _ in pairs]
    if len(pairs) < 2:
        raise ExpertError(f"merging needs at least two adapters, but {len(pairs)} was given")
    if twice := next((task for task in names if names.count(task) > 1), None):
        raise ExpertError(f"the task name {twice!r} is given to {names.count(twice)} adapters; task names must differ")
    for task in names:
        if wrong := unfit(task):
            raise ExpertError(f"the task name {task!r} {wrong}; give the adapter another name")
    return {task: read_adapter(task, source) for task, source in pairs}


def _check_base(adapters: Mapping[str, LoraAdapter], base: Any) -> None:
    """Raise ExpertError if the adapters name different bases, unless the user says which it is."""
    of = {task: adapter.base for task, adapter in adapters.items() if adapter.base}
    if base is None and len(set(of.values())) > 1:
        first, *others = of
        other = next(task for task in others if of[task] != of[first])
        raise ExpertError(
            f"the adapter {other!r} is of the base {of[other]}, and {first!r} of {of[first]}; name the base that all "
            "have as base=, or merge the full models with hf_zipit.merge"
        )


def aligned_updates(adapters: Mapping[str, LoraAdapter]) -> Updates:
    """By layer, in the layers' order by name, every adapter's factors; of rank 0 where it has none.

    Raises:
        ExpertError: a layer has other sizes in one adapter than in another.
    """
    found = {}
    for layer in sorted({layer for adapter in adapters.values() for layer in adapter.updates}):
        there = {task: own.updates[layer] for task, own in adapters.items() if layer in own.updates}
        forms = {
            task: (len(update.b), *adapters[task].forms[layer].inputs, adapters[task].forms[layer].kind)
            for task, update in there.items()
        }
        first = next(iter(there))
        if other := next((task for task in there if forms[task] != forms[first]), None):
            raise ExpertError(
                f"the layer {layer} is {forms[other]} in the adapter {other!r} and {forms[first]} in {first!r}; they "
                "are not of one base"
            )
        found[layer] = [there.get(task, none_like(there[first])) for task in adapters]
    return found
