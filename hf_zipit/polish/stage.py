"""Polish as a stage of `merge`: a merged model in, the same model trained out, never worse on held-out samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch

from hf_zipit.config import PolishConfig
from hf_zipit.data.calibration import Calibration
from hf_zipit.data.processes import placed
from hf_zipit.errors import DataError, RecipeError
from hf_zipit.experts.fingerprint import digest_strings, fingerprint_experts
from hf_zipit.maps.space_map import Alignment
from hf_zipit.modeling import ZipItPreTrainedModel
from hf_zipit.planning.plan import Plan
from hf_zipit.polish.kind import Finished, Learnt
from hf_zipit.polish.loop import Loop
from hf_zipit.polish.report import PolishReport
from hf_zipit.polish.samples import Samples
from hf_zipit.refit.asked import asked_token
from hf_zipit.refit.positions import Positions
from hf_zipit.refit.stage import readout_positions
from hf_zipit.registry import TRAININGS


def polish(
    merged: ZipItPreTrainedModel, planned: Plan, maps: Alignment, calibration: Calibration | None
) -> PolishReport | None:
    """Train a merged model as its config says, in place; None where nobody asks for it, or nothing is shared.

    All modules stay in evaluation mode: there is no dropout, and the statistics of batch norms stay what they were
    corrected to.

    Args:
        merged: after all corrections.
        planned: the plan of the merge; its config holds the settings.
        maps: of its spaces.
        calibration: the samples, the processes and the device. With the accelerator's mixed precision `"bf16"` the
            forward passes are in bfloat16.

    Raises:
        DataError: without calibration data, or with a single sample of a task.
        RecipeError: the accelerator's precision is fp16, or the checkpoint is another training's.
    """
    config = planned.config.polish
    if config is None or not planned.cut.trunk:
        return None

    def learn(positions: Positions) -> Learnt:
        finished = Finished(merged, planned, maps, positions)
        return TRAININGS.get(config.kind).function(finished, **config.options)

    return train(merged, planned, calibration, config, planned.tasks, learn)


def train(
    merged: ZipItPreTrainedModel,
    planned: Plan,
    calibration: Calibration | None,
    config: PolishConfig,
    tasks: tuple[str, ...],
    learn: Callable[[Positions], Learnt],
) -> PolishReport:
    """Train what `learn` makes of a model, given which positions count, on samples of some tasks; see `polish`."""
    if calibration is None:
        raise DataError("polish trains on what the experts compute: pass a little unlabelled data as calibration=")
    accelerator = calibration.run_on()
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise RecipeError(
            f"Training runs in float32 or with mixed precision bf16, but the accelerator's is "
            f"{accelerator.mixed_precision}; give another accelerator"
        )
    samples = Samples(calibration, tasks, config.held_out, planned.config.seed)
    asked = partial(asked_token, list(planned.folded.values()), calibration.micro_batches(64))
    positions = readout_positions(planned.model, calibration.processor, config.readout_weight, asked)
    with torch.enable_grad(), placed([merged, *planned.folded.values()], accelerator.device):
        learnt = learn(positions)
        progress = Loop(
            merged, learnt, samples, config, accelerator, fingerprint=_fingerprint(merged, planned, samples, config)
        ).run()
    measured = progress.agreements[0]
    return PolishReport(
        steps=progress.step,
        best=progress.best,
        kind=config.kind,
        seed=planned.config.seed,
        samples=samples.counts,
        loss=[progress.losses[0], progress.losses[progress.best]],
        agreement={task: [progress.agreements[step][task] for step in (0, progress.best)] for task in measured},
    )


def _fingerprint(merged: ZipItPreTrainedModel, planned: Plan, samples: Samples, config: PolishConfig) -> str:
    """What decides a training: the weights that it starts from, the experts, the samples and the settings."""
    settings = {name: value for name, value in asdict(config).items() if name != "checkpoint"}
    weights = fingerprint_experts({"": merged, **planned.folded})
    return digest_strings([*weights.values(), samples.digest(), f"{settings} {planned.config.seed}"])
