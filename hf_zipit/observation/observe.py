"""The streaming pass: every batch through all experts, and what their units do into `Moments`.

All experts see the same inputs, whichever task these belong to: only so can their units be compared (ZipIt, arXiv
2305.03053). Moments add, so that the batches can be shared out among the processes that `accelerate` starts, and be
summed once at the end: process r takes the batches i with i mod processes = r. Every sample counts exactly once.

A dry run on two samples comes first. It finds wrong data and silent probes before the long pass, in every process
alike, and counts what a forward pass costs, from which the share of rows follows: the moments of a space of d units
take (T d)^2 multiply-accumulates a row, and the pass must not cost more than the forward passes it rides on.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers.utils.logging import tqdm

from hf_zipit.adapters.signature import packed
from hf_zipit.config import AUTO
from hf_zipit.data.calibration import Calibration, CalibrationBatch
from hf_zipit.data.processes import all_reduce_sum, free_memory, placed, solving_device
from hf_zipit.errors import DataError, ExpertError, SpecError, ZipItError, is_out_of_memory
from hf_zipit.experts.fingerprint import digest_strings, digest_tensors, fingerprint_experts
from hf_zipit.experts.origins import versions
from hf_zipit.observation.moments import Moments, Sums
from hf_zipit.observation.record import Choose, Recorder, choose_rows, keep_all, mask_of, probe_name
from hf_zipit.planning.plan import Plan
from hf_zipit.steady import steady
from hf_zipit.symmetry.spec import MergeSpec, Probe, ProductKey

DRY_RUN_SAMPLES = 2
MINIMUM_ROWS = 64
"""With `row_fraction="auto"`, rows of a probe and batch that are kept whatever they cost."""

ENOUGH_ROWS = 1024
"""Rows that are multiplied at once, where batches have fewer."""

UNCOUNTED = {
    getattr(torch.ops.aten, f"_scaled_dot_product_{name}_attention", None) for name in ("flash", "efficient", "cudnn")
}
"""torch does not count what fused attention costs on a CPU. So it counts nowhere: all devices use the same rows."""

FORWARD_SHARE = 0.5
"""With `row_fraction="auto"`, what the moments may cost, as a share of the forward passes."""


class OpCounter(TorchDispatchMode):
    """Counts the floating-point operations of what runs in it.

    Like torch's `FlopCounterMode`, which also follows modules by hooks on gradients, and fails where a value that a
    module gets has none (Reformer's reversible layers).
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = getattr(func, "overloadpacket", None)
        if packet in flop_registry and packet not in UNCOUNTED:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


@steady
def observe(planned: Plan, calibration: Any) -> Moments:
    """The moments of a plan's folded experts on a `Calibration`, or data that one is made of; see `gather_moments`."""
    config, data = planned.config, Calibration.of(calibration).read(planned.experts)
    return data.while_it_fits(
        partial(gather_moments, planned.spec, planned.folded, data, row_fraction=config.row_fraction, seed=config.seed)
    )


def gather_moments(
    spec: MergeSpec,
    experts: Mapping[str, nn.Module],
    calibration: Calibration,
    *,
    keys: Iterable[ProductKey] | None = None,
    row_fraction: float | Literal["auto"] = AUTO,
    seed: int = 0,
) -> Moments:
    """The moments of every observable product of spaces, by running the experts over calibration data.

    The experts come back as they were: on their device, in their training mode, without hooks.

    Args:
        spec: its probes say where to read.
        experts: the models by task. Those placed by a `device_map` stay where they are.
        calibration: unlabelled inputs, read for these experts; every process must be given the same.
        keys: the products to observe; all that have a probe by default.
        row_fraction: share of the rows (tokens, positions) of every batch that is used, in (0, 1]; `"auto"` takes as
            many as cost half as much as the forward passes, and at least 64 rows of every probe and batch.
        seed: of the choice of rows. The same seed and data give the same moments for any number of processes, up to
            rounding.

    Raises:
        DataError: if the data is not what the model takes.
        ExpertError: if an expert's features are NaN or infinite, or differ in shape from the others'.
        SpecError: if a probe does not exist or never fires.
    """
    products = _products(spec, keys)
    tasks, accelerator = tuple(experts), calibration.run_on()
    prints = fingerprint_experts(experts)
    batches = calibration.batches()
    recorder = Recorder({probe: spec.size(key) for key, found in products.items() for probe in found})
    # Not inference_mode: buffers that a model makes on its first pass would be of no use to a later training.
    with placed(experts.values(), accelerator.device), recorder.attached(experts), torch.no_grad():
        affordable = _dry_run(recorder, experts, batches[0], accelerator.device)
        used, minimum = (affordable, MINIMUM_ROWS) if row_fraction == AUTO else (float(row_fraction), 1)
        moments = Moments(tasks, device=_moments_device(recorder, len(tasks), accelerator.device))
        waiting = _Waiting(moments, products)
        digests: list[tuple[int, str, int]] = []
        with together(accelerator):
            shown = tqdm(batches, desc="observe", unit="batch", disable=not accelerator.is_main_process)
            for index, batch in enumerate(shown):
                if index % accelerator.num_processes != accelerator.process_index:
                    continue
                choose = choose_rows(used, minimum, seed, index)
                features = {
                    task: _run(recorder, task, expert, batch.inputs, accelerator.device, choose)
                    for task, expert in experts.items()
                }
                waiting.add(features)
                digest = digest_tensors(sorted(batch.inputs.items()), str(batch.task))
                digests.append((index, digest, batch.samples))
            waiting.flush()
    if accelerator.num_processes > 1:
        moments = _reduce(moments, accelerator, spec, waiting.names)
        digests = sorted(gather_object(digests))
    moments.fingerprint = {
        "experts": prints,
        "data": digest_strings(digest for _, digest, _ in digests),
        "samples": sum(samples for _, _, samples in digests),
        "seed": seed,
        "row_fraction": used,
        "version": versions().get("hf-zipit", "unknown"),
    }
    return moments


def _products(spec: MergeSpec, keys: Iterable[ProductKey] | None) -> dict[ProductKey, tuple[Probe, ...]]:
    products = spec.products()
    if not products:
        raise SpecError(f"The spec of {spec.architecture} has no probes: none of its spaces can be observed.")
    if keys is None:
        return products
    keys = [tuple(key) for key in keys]
    if unknown := [key for key in keys if key not in products]:
        raise SpecError(f"The spec of {spec.architecture} has no probe for {unknown}, only for {list(products)}.")
    return {key: products[key] for key in keys}


def _dry_run(
    recorder: Recorder, experts: Mapping[str, nn.Module], first: CalibrationBatch, device: torch.device
) -> float:
    """Run one expert on two samples; return the share of rows whose moments cost half as much as the forward passes.

    The forward pass is counted as it runs and not taken from the spec: calibration texts may be longer than its own.
    """
    task, expert = next(iter(experts.items()))
    inputs = {name: tensor[:DRY_RUN_SAMPLES] for name, tensor in first.inputs.items()}
    with torch.enable_grad(), OpCounter() as counter:  # with gradients torch's own encoders run op by op
        features = _run(recorder, task, expert, inputs, device)
    if unseen := [probe for probe in recorder.units if probe_name(probe) not in features]:
        raise SpecError(
            f"The {unseen[0].where} of {unseen[0].module!r} was never seen: the expert {task!r} does not call that "
            "module with these calibration inputs; give data that reach it, or example_inputs={...} like these data: "
            "what they do not reach is combined as it is."
        )
    macs = counter.flops / 2
    cost = sum(
        len(features[probe_name(probe)]) * (len(experts) * units) ** 2 for probe, units in recorder.units.items()
    )
    return min(1.0, FORWARD_SHARE * len(experts) * macs / max(cost, 1))


def _run(
    recorder: Recorder,
    task: str,
    expert: nn.Module,
    inputs: Mapping[str, Tensor],
    device: torch.device,
    choose: Choose = keep_all,
) -> dict[str, Tensor]:
    """Rows of every probe; what the model itself raises is told as a fault of the data."""
    try:
        return recorder.run(task, expert, arguments_for(expert, inputs, device), choose, mask_of(inputs))
    except ZipItError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        shapes = {name: list(tensor.shape) for name, tensor in inputs.items()}
        raise DataError(f"The expert {task!r} cannot run on calibration inputs of shapes {shapes}: {error}") from error


def arguments_for(expert: nn.Module, inputs: Mapping[str, Tensor], device: torch.device) -> dict[str, Any]:
    device = _entry_device(expert, device)
    dtype = next((p.dtype for p in expert.parameters() if p.is_floating_point()), torch.float32)
    arguments: dict[str, Any] = {
        name: tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)
        for name, tensor in packed(inputs).items()
    }
    if "use_cache" in inspect.signature(type(expert).forward).parameters:
        arguments["use_cache"] = False  # keys and values of past tokens are of no use here
    return arguments


def _entry_device(expert: nn.Module, device: torch.device) -> torch.device | int | str:
    """Where inputs go: the first device that a `device_map` computes on, or the one all experts were moved to."""
    places = getattr(expert, "hf_device_map", None)
    if not places:
        return device
    return next((place for place in places.values() if place not in ("cpu", "disk")), "cpu")


class _Waiting:
    """Rows that wait until they are many: to add a product in float64 costs as much as some hundred rows of it."""

    def __init__(self, moments: Moments, products: Mapping[ProductKey, tuple[Probe, ...]]) -> None:
        self.moments = moments
        self.names = [(key, probe_name(probe)) for key, probes in products.items() for probe in probes]
        self.features: dict[str, list[list[Tensor]]] = {name: [] for _, name in self.names}

    def add(self, features: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Add the rows of one batch: by task, then by probe."""
        for key, name in self.names:
            if silent := [task for task, rows in features.items() if name not in rows]:
                raise SpecError(f"The expert {silent[0]!r} did not call the module of the probe {name} on a batch.")
            counts = {task: len(rows[name]) for task, rows in features.items()}
            if len(set(counts.values())) > 1:
                raise ExpertError(
                    f"The experts have different numbers of rows at {name} on the same inputs: {counts}."
                )
            self.features[name].append([rows[name] for rows in features.values()])
            if sum(len(rows[0]) for rows in self.features[name]) >= ENOUGH_ROWS:
                self._flush(key, name)

    def flush(self) -> None:
        """Add what still waits."""
        for key, name in self.names:
            self._flush(key, name)

    def _flush(self, key: ProductKey, name: str) -> None:
        if batches := self.features[name]:
            self.moments.add(key, [torch.cat(parts) for parts in zip(*batches, strict=True)], name)
            self.features[name] = []


def _moments_device(recorder: Recorder, experts: int, device: torch.device) -> torch.device:
    """The float64 sums live on an accelerator that knows such where they take less than half of its free memory."""
    needed = sum(8 * (experts * units) ** 2 for units in recorder.units.values())
    home = solving_device(device)
    return home if 2 * needed < free_memory(home) else torch.device("cpu")


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """An error in one process is raised in all of them: the others would wait for its moments forever."""
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    if accelerator.num_processes > 1:
        messages = gather_object([None if error is None else str(error)])
        if error is None and (message := next(filter(None, messages), None)):
            error = ZipItError(message)
    if error is not None:
        raise error


def _reduce(
    moments: Moments, accelerator: Accelerator, spec: MergeSpec, names: list[tuple[ProductKey, str]]
) -> Moments:
    """Sum over the processes; one that had no batch adds zeros."""
    reduced = Moments(moments.tasks)
    for key, name in names:
        empty = Sums.empty(len(moments.tasks) * spec.size(key), moments.device)
        sums = moments.sums.get(key, {}).get(name, empty)
        reduced.sums.setdefault(key, {})[name] = _reduce_sums(sums, accelerator)
    return reduced


def _reduce_sums(sums: Sums, accelerator: Accelerator) -> Sums:
    """First the mean of all processes' rows, then the sums about it, so that no digits are lost to a large mean."""

    add = partial(all_reduce_sum, accelerator=accelerator)
    count = int(add(torch.tensor([sums.count])))
    mean = add(sums.total + sums.count * sums.shift) / count
    about = sums.about(mean)
    return Sums(count, mean, add(about.total), add(about.second))
