"""Losses and errors on held-out samples that have answers, for what is compared merge by merge."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from hf_zipit.data.held_out import HeldOut
from hf_zipit.data.labels import IGNORED
from hf_zipit.data.processes import running
from hf_zipit.evaluation.batches import Subject


@torch.inference_mode()
def losses(
    model: PreTrainedModel | Mapping[str, PreTrainedModel], held: HeldOut, batch_size: int = 64
) -> dict[str, tuple[float, float]]:
    """By task the mean cross-entropy in nats and the share of wrong answers, the task being known.

    Args:
        model: a merged one, or the experts by task.
        held: the samples, of some of its tasks.
        batch_size: of the forward passes, which run where the model is.
    """
    subject, found = Subject.of(model), {}
    device = next(subject.model.parameters()).device
    with running([subject.model], device):
        for task, columns in held.tasks.items():
            loss = wrong = count = 0.0
            for batch in columns.batches(batch_size):
                batch = {name: tensor.to(device) for name, tensor in batch.items()}
                labels = batch.pop("labels")
                logits = subject.model(**batch, task=task).logits
                if subject.causal:
                    logits, labels = logits[:, :-1], labels[:, 1:]
                logits, labels = logits.flatten(0, -2).float(), labels.flatten()
                asked = labels != IGNORED
                loss += float(functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"))
                wrong += int((logits.argmax(-1) != labels)[asked].sum())
                count += int(asked.sum())
            found[task] = (loss / count, wrong / count)
    return found
