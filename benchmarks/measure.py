"""One row of the results: merge a pair of the zoo by one method, with time and memory, and score what came out.

Every row is measured in a process of its own, so that no row finds memory, caches or threads of another. What the
process has to load in any case (libraries, experts, data) counts neither as time nor as memory: both are taken from
the call of `merge` alone, after a `plan` with the same arguments.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.utils import ModelOutput
from transformers.utils.logging import disable_progress_bar

import hf_zipit
from benchmarks.memory import resident, restart_peak
from benchmarks.zoo import Pair, load
from hf_zipit.correct.sites import is_batch_norm
from hf_zipit.merging import merge, plan
from hf_zipit.modeling.joint import side_by_side

SEED = 0  # of the calibration samples and of the merge


@dataclass(frozen=True)
class Method:
    """What a row merges by.

    Attributes:
        settings: arguments of `merge`; empty for the references, which merge nothing.
        data: whether it is given the calibration data.
        about: one line for the table's legend.
        fits: whether a pair can have this row at all.
        by_pair: further arguments, which differ between the pairs.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    data: bool = True
    about: str = ""
    fits: Callable[[Pair], bool] = lambda pair: True
    by_pair: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def settings_for(self, pair: str) -> dict[str, Any]:
        """The arguments of `merge` for a pair."""
        own = self.by_pair.get(pair, {})
        together = {**own, **self.settings}
        if isinstance(own.get("refit"), Mapping):
            wanted = self.settings.get("refit")
            together["refit"] = {**own["refit"], **(wanted if isinstance(wanted, Mapping) else {})}
        return together


def concatenates(pair: Pair) -> bool:
    """Whether the pair's joint output is the tasks' logits side by side."""
    return pair.metric.classes is not None and pair.metric.output == "logits"


def has_batch_norm(pair: Pair) -> bool:
    """Whether the experts keep running statistics."""
    return any(is_batch_norm(module) for expert in pair.experts.values() for module in expert.modules())


EXPERTS, ENSEMBLE = "experts", "experts side by side"

REFERENCES = {
    EXPERTS: Method(data=False, about="each expert on its own task"),
    ENSEMBLE: Method(data=False, about="both experts on every sample, their outputs joined; twice the size"),
}

ZIP_ALL = {"method": "zip", "options": {"beta": 1.0}}
"""Zip with as many joins inside an expert as across."""

AVERAGE = {"method": "identity"}

CHOSEN: dict[str, dict[str, Any]] = {
    "fashion-vit": AVERAGE,
    "fashion-resnet": ZIP_ALL,
    "captions-clip": AVERAGE,
    "wordnet-bert": ZIP_ALL,
    "glosses-prelayernorm-mlm": AVERAGE,
    "glosses-roberta-mlm": AVERAGE,
}
"""Which alignment a refit starts from: the best on the pair's validation split (`--split validation`) among none,
permute and zip with beta 1 (residual streams matched or left at identity); the plain one where they are within .1 %.
"""


def has_choice(pair: Pair) -> bool:
    """Whether an alignment was chosen for the pair."""
    return pair.name in CHOSEN


METHODS = {
    "average": Method({"method": "identity"}, data=False, about="the mean of the weights as they are"),
    "permute": Method({"method": "permute"}, about="units paired by their activations"),
    "zip": Method({"method": "zip"}, about="ZipIt!: alike units joined, within and across experts"),
    "weights": Method({"method": "weights"}, data=False, about="Git Re-Basin: units paired by their weights, no data"),
    "dual": Method({"method": "dual"}, about="MuDSC: units paired by activations and weights together"),
    "cca": Method({"method": "cca"}, about="permute, and canonical correlations inside heads"),
    "orthogonal": Method(
        {"method": "orthogonal"}, about="residual streams rotated (Procrustes), heads by circuits, the rest paired"
    ),
    "circuits": Method(
        {"method": "circuits"}, data=False, about="heads paired and turned by their circuits, the rest by weights"
    ),
    "partial 1.5": Method(
        {"method": "partial", "options": {"budget": 1.5}},
        about="PLeaS: permute, the worst pairs kept apart, at most half an expert's parameters more",
    ),
    "zip + BatchNorm reset": Method(
        {"method": "zip", "corrections": ["batchnorm-reset"]},
        about="zip, then the merged model's own running statistics",
        fits=has_batch_norm,
    ),
    "zip + REPAIR": Method(
        {"method": "zip", "corrections": ["repair"]}, about="zip, then means and deviations as the experts have them"
    ),
    "zip + rescale-shift": Method(
        {"method": "zip", "corrections": ["rescale-shift"]}, about="zip, then features rescaled and shifted per task"
    ),
    "average + refit": Method({"method": "identity", "refit": True}, about="average, then regressed on the experts"),
    "permute + refit": Method({"method": "permute", "refit": True}, about="the same after permute"),
    "zip + refit": Method(
        {**ZIP_ALL, "residual": "identity", "refit": True},
        about="the same after zip with beta 1, the residual stream left at identity",
    ),
    "chosen + refit": Method(
        {"refit": True},
        about="the same after the alignment that was best, by an earlier refit, on the pair's validation split",
        fits=has_choice,
        by_pair=CHOSEN,
    ),
    "chosen + refit + joint heads": Method(
        {"refit": {"joint_heads": True}},
        about="the same, and logits comparable between the tasks",
        fits=lambda pair: has_choice(pair) and concatenates(pair),
        by_pair=CHOSEN,
    ),
    "partial 1.5 + refit": Method(
        {"method": "partial", "options": {"budget": 1.5}, "refit": True}, about="the same after partial"
    ),
}


@dataclass(frozen=True)
class Row:
    """What was measured.

    Attributes:
        pair, method, split: what was measured on what.
        depth: the merged share of the blocks; None for the references.
        samples: unlabelled calibration samples per task; None for methods that look at none.
        scores: by task, within the task's own classes, in 0..1.
        joint: among the classes of all tasks; None where that has no meaning.
        perplexities: by task, of language models.
        size: parameters, in experts.
        seconds, cpu_seconds: of `merge`, by the clock and of all threads; None for the references.
        peak_mib: how far the resident memory rose above what it was before `merge`; None where it cannot be told.
        sources: the version of the package's sources, see `sources()`.
        machine: where it was measured, see `machine()`.
        error: why there are no numbers; empty if there are.
    """

    pair: str
    method: str
    depth: float | None
    split: str
    samples: int | None
    scores: dict[str, float] = field(default_factory=dict)
    joint: float | None = None
    perplexities: dict[str, float] = field(default_factory=dict)
    size: float | None = None
    seconds: float | None = None
    cpu_seconds: float | None = None
    peak_mib: float | None = None
    sources: str = ""
    machine: str = ""
    error: str = ""

    @property
    def mean(self) -> float | None:
        """Mean of the tasks' scores."""
        return sum(self.scores.values()) / len(self.scores) if self.scores else None


def measure(zoo: str, pair: str, method: str, depth: float | None, split: str, samples: int) -> Row | None:
    """One row, from this process; None if the method does not fit the pair.

    Args:
        zoo: the folder of the trained experts.
        pair, method, depth, split: what to measure on what.
        samples: calibration samples per task, of the train split.
    """
    disable_progress_bar()
    chosen = (REFERENCES | METHODS)[method]
    loaded = load(pair, zoo, train=False)
    if not chosen.fits(loaded):
        return None
    about = {
        "pair": pair,
        "method": method,
        "depth": depth,
        "split": split,
        "sources": sources(),
        "machine": machine(),
    }
    if method in REFERENCES:
        scores = {task: loaded.score(model, task, split) for task, model in loaded.experts.items()}
        joint = loaded.joint_score(partial(ensemble, loaded), split) if method == ENSEMBLE else None
        sizes = [parameters(expert) for expert in loaded.experts.values()]
        size = sum(sizes) / sizes[0] if method == ENSEMBLE else 1.0
        perplexities = loaded.perplexities(loaded.experts, split)
        return Row(**about, samples=None, scores=scores, joint=joint, perplexities=perplexities, size=size)
    calibration = {task: loaded.calibration(task, samples, SEED) for task in loaded.experts} if chosen.data else None
    merged, cost = merged_with_cost(loaded, calibration, {**chosen.settings_for(pair), "depth": depth})
    return Row(**about, **cost, samples=samples if chosen.data else None, **scored(loaded, merged, split))


def scored(pair: Pair, merged: nn.Module, split: str) -> dict[str, Any]:
    """The fields of `Row` that say how good and how large a merged model is."""
    answers = {task: partial(merged, task=task) for task in pair.experts}
    return {
        "scores": {task: pair.score(answer, task, split) for task, answer in answers.items()},
        "joint": pair.joint_score(merged, split),
        "perplexities": pair.perplexities(answers, split),
        "size": parameters(merged) / parameters(next(iter(pair.experts.values()))),
    }


def measure_apart(measuring: Callable[..., Row | None] = measure, **request: Any) -> Row | None:
    """`measure`, or another function of its arguments, in a fresh process; what goes wrong becomes the row's error."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(measuring, **request).result()
        except Exception as error:  # one broken method must not cost the rest of the table
            about = {name: request[name] for name in ("pair", "method", "depth", "split", "samples")}
            return Row(**about, sources=sources(), machine=machine(), error=f"{type(error).__name__}: {error}")


def merged_with_cost(pair: Pair, calibration: Any, settings: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """The merged model, and the fields of `Row` that say what merging cost."""
    planned = {name: value for name, value in settings.items() if name not in ("refit", "corrections")}
    plan(pair.experts, **planned)  # imports what tracing needs; merging on few samples would leave memory to reuse
    before = restart_peak()
    start, work = time.perf_counter(), time.process_time()
    merged = merge(pair.experts, calibration, processor=pair.tokenizer, seed=SEED, **settings)
    seconds, work = time.perf_counter() - start, time.process_time() - work
    peak = None if before is None else resident("VmHWM") - before
    return merged, {"seconds": seconds, "cpu_seconds": work, "peak_mib": peak}


@torch.inference_mode()
def ensemble(pair: Pair, **inputs: Any) -> ModelOutput:
    """The joint output of the experts themselves, joined as a merged model joins its branches'."""
    return side_by_side([expert(**inputs) for expert in pair.experts.values()])


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def sources() -> str:
    """A short digest of the package's code: rows that differ in it are of different versions."""
    root = Path(hf_zipit.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:8]


def machine() -> str:
    """The processor, cores and threads, and the versions that decide the numbers."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    threads = torch.get_num_threads()
    return (
        f"CPU ({model}), {os.cpu_count()} cores, {threads} thread{'s' * (threads != 1)}; "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )
