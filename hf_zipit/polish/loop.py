"""The training loop: AdamW with warm-up and a cosine, early stopping, a state that can be gone on from.

Every process takes its share of every batch, and the gradients are summed over the processes: all hold the same
weights at every step.

Invariants: the seed, the data and the settings decide the weights, however often the training was broken off; of all
weights that were measured on the held-out samples, those of the closed form included, the best are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers.utils.logging import tqdm

from hf_zipit.config import PolishConfig
from hf_zipit.data.calibration import Inputs, size_of
from hf_zipit.data.processes import all_reduce_sum
from hf_zipit.modeling import ZipItPreTrainedModel
from hf_zipit.polish.kind import Learnt
from hf_zipit.polish.samples import Samples
from hf_zipit.polish.state import Progress, load_state, save_state

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW remembers of every parameter."""


class Loop:
    """One training.

    Args:
        merged: the model, in evaluation mode, on the accelerator's device.
        learnt: what is learnt, and the loss that is made smaller.
        samples: what it is measured on.
        config: the settings.
        accelerator: the processes and the precision.
        fingerprint: what a state that is gone on from must be of.
    """

    def __init__(
        self,
        merged: ZipItPreTrainedModel,
        learnt: Learnt,
        samples: Samples,
        config: PolishConfig,
        accelerator: Accelerator,
        *,
        fingerprint: str,
    ) -> None:
        self.merged, self.learnt, self.samples = merged, learnt, samples
        self.config, self.accelerator, self.fingerprint = config, accelerator, fingerprint
        self.parameters = dict(learnt.parameters)
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.best: dict[str, Tensor] = {}
        self.progress = Progress()

    def run(self) -> Progress:
        """Train, and leave the best weights in the model."""
        with training_only(self.merged, [*self.parameters.values(), *self.learnt.through]):
            self._start()
            shown = tqdm(
                total=self.config.steps, initial=self.progress.step, desc="train", unit="step",
                disable=not self.accelerator.is_main_process,
            )  # fmt: skip
            with shown:
                while self.progress.step < self.config.steps and not self._is_stuck():
                    self._step(self.progress.step)
                    self.progress.step += 1
                    if self.progress.step % self.config.evaluate_every == 0 or self.progress.step == self.config.steps:
                        self._measure()
                        self._save()
                        shown.set_postfix(held_out=f"{self.progress.losses[self.progress.step]:.4f}")
                    shown.update()
            self._put(self.best)
            self.learnt.put(None)
        return self.progress

    def _is_stuck(self) -> bool:
        return 0 < self.config.patience <= self.progress.waited()

    def _step(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * schedule(step, self.config.steps, self.config.warmup)
        self.optimizer.zero_grad()
        self.learnt.put(step)
        for task in self.samples.tasks:
            batch = self.samples.batch(task, step, self.config.batch_size)
            own = self._share(batch)
            if size_of(own):
                with self.accelerator.autocast():
                    apart = self.learnt.distance(task, own)
                (apart.loss * (size_of(own) / size_of(batch))).backward()
        self.learnt.pull()
        for parameter in self.parameters.values():
            if self.accelerator.num_processes > 1:  # one that no sample of this process reached is summed, too
                own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = all_reduce_sum(own, self.accelerator)
        nn.utils.clip_grad_norm_(self.parameters.values(), self.config.max_grad_norm)
        self.optimizer.step()

    def _share(self, batch: Inputs) -> Inputs:
        start, stride = self.accelerator.process_index, self.accelerator.num_processes
        return {name: tensor[start::stride] for name, tensor in batch.items()}

    @torch.no_grad()
    def _measure(self) -> None:
        """Measure on the held-out samples; what is best so far is remembered."""
        self.learnt.put(None)
        tasks = self.samples.tasks
        sums = torch.zeros(len(tasks), 4, dtype=torch.float64)
        for row, task in zip(sums, tasks, strict=True):
            for batch in self.samples.held_out(task, self.config.batch_size):
                own = self._share(batch)
                if count := size_of(own):
                    with self.accelerator.autocast():
                        apart = self.learnt.distance(task, own)
                    row += torch.tensor([float(apart.loss) * count, count, apart.agreed, apart.asked])
        sums = all_reduce_sum(sums, self.accelerator)
        losses = sums[:, 0] / sums[:, 1]
        agreement = {task: float(row[2] / row[3]) for task, row in zip(tasks, sums, strict=True) if row[3]}
        if self.progress.add(float(losses.mean()), agreement):
            self.best = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    # --------------------------------------------------------------------------------------------- the state

    def _start(self) -> None:
        """From where an earlier training was broken off, else from the closed form."""
        folder = self.config.checkpoint
        found = load_state(folder, self.fingerprint) if folder is not None else None
        if found is None:
            self._measure()
            return
        tensors, self.progress = found
        kinds = ("now", "best", *MOMENTS)
        parts = {kind: {name: tensors[f"{kind}/{name}"] for name in self.parameters} for kind in kinds}
        self.best = {name: tensor.to(self.parameters[name].device) for name, tensor in parts["best"].items()}
        self._put(parts["now"])
        for name, parameter in self.parameters.items():
            state = self.optimizer.state[parameter]
            state["step"] = torch.tensor(float(self.progress.step))
            for kind in MOMENTS:
                state[kind] = parts[kind][name].to(parameter.device)

    def _save(self) -> None:
        if self.config.checkpoint is None or not self.accelerator.is_main_process:
            return
        tensors = {}
        for name, parameter in self.parameters.items():
            # A parameter that no sample reaches has no moments.
            state = self.optimizer.state.get(parameter) or dict.fromkeys(MOMENTS, torch.zeros_like(parameter))
            tensors |= {f"now/{name}": parameter, f"best/{name}": self.best[name]}
            tensors |= {f"{kind}/{name}": state[kind] for kind in MOMENTS}
        save_state(self.config.checkpoint, tensors, self.progress, self.fingerprint)

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])


def schedule(step: int, steps: int, warmup: float) -> float:
    """The share of the peak rate: a line up to 1 over the share `warmup` of all steps, then half a cosine."""
    rising = warmup * steps
    if step < rising:
        return (step + 1) / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(steps - rising, 1)))


@contextmanager
def training_only(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Gradients for these parameters alone; afterwards as before, without gradients."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    chosen = set(parameters)
    for parameter in before:
        parameter.requires_grad_(parameter in chosen)
    try:
        yield
    finally:
        for parameter, wanted in before.items():
            parameter.requires_grad_(wanted)
            parameter.grad = None
