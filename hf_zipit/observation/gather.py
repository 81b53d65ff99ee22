"""The pass that gathers `LayerStatistics`: every expert over its own task's data, alone.

Who owns one expert and its data needs nobody else's for it. Batches are shared out among the processes that
`accelerate` starts, and sums are added up at the end.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from hf_zipit.adapters import adapter_for
from hf_zipit.data.calibration import Calibration
from hf_zipit.data.processes import all_reduce_sum, placed
from hf_zipit.errors import DataError, ZipItError, is_out_of_memory
from hf_zipit.experts.fingerprint import digest_tensors, fingerprint_experts
from hf_zipit.experts.loading import Experts, load_experts
from hf_zipit.experts.origins import versions
from hf_zipit.hub.reasons import first_line
from hf_zipit.observation.fisher import squared_gradients
from hf_zipit.observation.layers import InputSums
from hf_zipit.observation.observe import arguments_for, together
from hf_zipit.observation.record import mask_of
from hf_zipit.observation.statistics import KINDS, Known, LayerStatistics, Summed, loaded
from hf_zipit.planning.plan import Plan
from hf_zipit.registry import RESIDUES, RULES
from hf_zipit.steady import steady
from hf_zipit.symmetry.ops import is_within
from hf_zipit.symmetry.spec import MergeSpec


@steady
def gather_statistics(
    experts: Experts, data: Any, *, kinds: Collection[str] = ("grams",), seed: int = 0, **reading: Any
) -> LayerStatistics:
    """The statistics of experts, each on its own task's data; on all of it where the data is for all tasks.

        gather_statistics({"shoes": "me/shoes"}, {"shoes": images}).save("shoes.safetensors")

    Args:
        experts: the models by task, one or more, loaded or not.
        data: unlabelled data, or a `Calibration`.
        kinds: `"grams"`, and `"fisher"`, which takes gradients.
        seed: of the outcomes that are drawn for `"fisher"`.
        reading: `processor`, `columns` and `batch_size` of a `Calibration`.

    Raises:
        DataError: the data is not what the models take, or a kind is unknown.
        ExpertError: an expert computes NaN.
    """
    models = load_experts(experts, least=1)
    if unknown := set(kinds) - set(KINDS):
        raise DataError(f"There are no statistics called {sorted(unknown)[0]!r}; the kinds are {list(KINDS)}.")
    calibration = Calibration.of(data, **reading).read(models)
    return calibration.while_it_fits(partial(gathered, models, calibration, kinds=kinds, seed=seed))


def gathered(
    experts: Mapping[str, nn.Module], calibration: Calibration, *, kinds: Collection[str], seed: int = 0
) -> LayerStatistics:
    """See `gather_statistics`; of loaded models, and calibration data that was read for them or others by their tasks.

    The models come back as they were: on their device, in their training mode, without hooks.
    """
    accelerator, first = calibration.run_on(), next(iter(experts.values()))
    spec, fields = MergeSpec.from_model(first), adapter_for(first).outputs(first)
    names = {name for name in spec.axes if not any(is_within(name, head) for head in spec.head)}
    trained = sorted(names & {name for name, _ in first.named_parameters(remove_duplicate=False)})
    mine = list(enumerate(calibration.batches()))[accelerator.process_index :: accelerator.num_processes]
    found = LayerStatistics({kind: {task: {} for task in experts} for kind in kinds})
    seen: dict[str, list[tuple[int, str, int]]] = {task: [] for task in experts}
    with placed(experts.values(), accelerator.device), together(accelerator):
        for task, expert in experts.items():
            inputs = InputSums(names, task)
            for index, batch in mine:
                if batch.task not in (None, task):
                    continue
                arguments = arguments_for(expert, batch.inputs, accelerator.device)
                inputs.mask = mask_of(arguments)
                if "grams" in kinds:
                    with inputs.attached(expert), torch.no_grad(), told_of_data(task):
                        expert(**arguments)
                if "fisher" in kinds:
                    generator = torch.Generator().manual_seed(seed + index)
                    with told_of_data(task):
                        squares = squared_gradients(expert, arguments, trained, fields, generator, batch.samples)
                    add(found.sums["fisher"][task], {n: Summed(batch.samples, x) for n, x in squares.items()})
                seen[task].append((index, digest_tensors(sorted(batch.inputs.items())), batch.samples))
            if "grams" in kinds:
                found.sums["grams"][task], found.same = inputs.sums, {**found.same, **inputs.same}
    if accelerator.num_processes > 1:
        found, seen = reduced(found, seen, accelerator)
    found.fingerprint = {
        "experts": fingerprint_experts(experts),
        "data": {task: [digest for _, digest, _ in sorted(parts)] for task, parts in seen.items()},
        "samples": {task: sum(samples for _, _, samples in parts) for task, parts in seen.items()},
        "version": versions().get("hf-zipit", "unknown"),
    }
    return found


def statistics_for(planned: Plan, calibration: Calibration | None, known: Known | None) -> LayerStatistics | None:
    """The statistics that the plan's rule and residues read: known ones if given, else gathered; None for none.

    Raises:
        DataError: the known ones are of other experts or of another kind, or there is nothing to gather them from.
    """
    rule = RULES.get(planned.config.combine)
    kinds = [kind for kind in KINDS if kind in rule.wants]
    residues = planned.config.residues
    spent = residues is not None and RESIDUES.get(residues.kind).stepwise
    if known is None and calibration is not None and spent and "grams" not in kinds:
        kinds.append("grams")  # where there is data, it says what an error of a weight costs
    if not kinds:
        return None
    if known is None:
        if calibration is None:
            raise DataError(
                f"combine={planned.config.combine!r} reads statistics of the layers: pass a little unlabelled data as "
                "calibration=, or statistics="
            )
        calibration.read(planned.experts)
        work = partial(gathered, planned.folded, calibration, kinds=kinds, seed=planned.config.seed)
        return calibration.while_it_fits(work)
    found = loaded(known).of(fingerprint_experts(planned.folded))
    for kind in kinds:
        if missing := [task for task in planned.tasks if not found.sums.get(kind, {}).get(task)]:
            raise DataError(
                f"The statistics of {missing[0]!r} hold no {kind}, which combine={planned.config.combine!r} reads: "
                f"gather them with kinds=[{kind!r}]."
            )
    return found


def add(into: dict[str, Summed], more: Mapping[str, Summed]) -> None:
    """Add sums to those of the same names."""
    for name, values in more.items():
        into[name] = into[name] + values if name in into else values


@contextmanager
def told_of_data(task: str) -> Iterator[None]:
    """What the model itself raises is told as a fault of the data."""
    try:
        yield
    except ZipItError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise DataError(f"The expert {task!r} cannot run on its data: {first_line(error)}") from error


Seen = dict[str, list[tuple[int, str, int]]]


def reduced(found: LayerStatistics, seen: Seen, accelerator: Accelerator) -> tuple[LayerStatistics, Seen]:
    """The sums over all processes; one that had no batch of a task adds zeros."""
    shapes = {
        (kind, task, name): tuple(values.total.shape)
        for kind, by_task in found.sums.items() for task, own in by_task.items() for name, values in own.items()
    }  # fmt: skip
    every = gather_object([(shapes, found.same, seen)])
    known = {key: shape for one, _, _ in every for key, shape in one.items()}
    whole = LayerStatistics({kind: {task: {} for task in by} for kind, by in found.sums.items()})
    for kind, task, name in sorted(known):
        own = found.sums[kind][task].get(name, Summed(0, torch.zeros(known[kind, task, name], dtype=torch.float64)))
        count = all_reduce_sum(torch.tensor([own.count], dtype=torch.float64), accelerator)
        whole.sums[kind][task][name] = Summed(float(count), all_reduce_sum(own.total, accelerator))
    whole.same = {name: other for _, same, _ in every for name, other in same.items()}
    return whole, {task: [part for _, _, parts in every for part in parts[task]] for task in seen}
