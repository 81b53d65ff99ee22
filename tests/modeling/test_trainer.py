"""`transformers.Trainer` evaluates and trains merged models as any other."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from datasets import Dataset
from transformers import EvalPrediction, Trainer, TrainingArguments

from .by_hand import FAMILIES, make_experts, merge_by_hand


def images(task: str, classes: int, size: int = 10) -> Dataset:
    generator = torch.Generator().manual_seed(classes)
    pixels = torch.randn(size, 3, 16, 16, generator=generator)
    rows = {"pixel_values": pixels.numpy(), "labels": [row % classes for row in range(size)], "task": [task] * size}
    return Dataset.from_dict(rows | {"junk": ["x"] * size}).with_format(
        "torch", columns=["pixel_values", "labels"], output_all_columns=True
    )


def collate(rows: list[dict]) -> dict:
    batch = {name: torch.stack([row[name] for row in rows]) for name in ("pixel_values", "labels")}
    return batch | ({"task": [row["task"] for row in rows]} if "task" in rows[0] else {})


def accuracy(found: EvalPrediction) -> dict[str, float]:
    assert isinstance(found.predictions, numpy.ndarray)
    return {
        "accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean()),
        "width": found.predictions.shape[-1],
    }


def arguments(folder: Path, **settings: object) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder), per_device_eval_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True, **settings
    )


def test_evaluates_a_dataset_per_task_with_a_task_column(tmp_path: Path) -> None:
    shared = FAMILIES["vit"].part
    experts = make_experts("vit", shared)
    merged = merge_by_hand(experts, shared)
    sets = {"clothes": images("clothes", 3), "shoes": images("shoes", 2)}
    trainer = Trainer(
        model=merged, args=arguments(tmp_path), eval_dataset=sets, data_collator=collate, compute_metrics=accuracy
    )
    found = trainer.evaluate()
    for task, expert in experts.items():
        rows = collate(list(sets[task]))
        with torch.no_grad():
            output = expert(rows["pixel_values"], labels=rows["labels"])
        assert found[f"eval_{task}_accuracy"] == pytest.approx(
            (output.logits.argmax(-1) == rows["labels"]).float().mean().item()
        )
        assert found[f"eval_{task}_loss"] == pytest.approx(output.loss.item(), rel=1e-5)
        assert found[f"eval_{task}_width"] == expert.config.num_labels


def test_evaluates_jointly_without_a_task_column(tmp_path: Path) -> None:
    merged = merge_by_hand(make_experts("vit"))
    joint = images("clothes", 5).remove_columns("task")
    trainer = Trainer(model=merged, args=arguments(tmp_path), data_collator=collate, compute_metrics=accuracy)
    found = trainer.evaluate(joint)
    rows = collate(list(joint))
    with torch.no_grad():
        output = merged(**rows)
    assert found["eval_width"] == 5
    assert found["eval_accuracy"] == pytest.approx((output.logits.argmax(-1) == rows["labels"]).float().mean().item())
    assert found["eval_loss"] == pytest.approx(output.loss.item(), rel=1e-5)


def test_training_moves_trunk_and_branches(tmp_path: Path) -> None:
    shared = FAMILIES["vit"].part
    merged = merge_by_hand(make_experts("vit", shared), shared)
    before = {name: tensor.clone() for name, tensor in merged.state_dict().items()}
    joint = images("clothes", 5).remove_columns("task")
    settings = arguments(tmp_path, max_steps=2, learning_rate=1e-2, save_strategy="no")
    Trainer(model=merged, args=settings, train_dataset=joint, data_collator=collate).train()
    moved = {name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, before[name])}
    for part in (
        "trunk.vit.layers.0.mlp.fc1.weight",
        "branches.clothes.classifier.weight",
        "branches.shoes.classifier.weight",
    ):
        assert part in moved
