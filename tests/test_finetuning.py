"""Fine-tuning a merged model with `transformers.Trainer`: trunk and branches learn, checkpoints load again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

import hf_zipit
from hf_zipit.modeling import ZipItPreTrainedModel
from tests.tiny import pair

TASKS = ("clothes", "shoes")


def images(classes: int, size: int = 16) -> Dataset:
    """Noisy pictures of a pattern for every class, so that there is something to learn."""
    generator = torch.Generator().manual_seed(classes)
    labels = torch.arange(size) % classes
    patterns, noise = (torch.randn(n, 3, 16, 16, generator=generator) for n in (classes, size))
    return Dataset.from_dict({"pixel_values": (patterns[labels] + 0.3 * noise).numpy(), "labels": labels})


DATA = {"clothes": images(3), "shoes": images(4)}


def merged(corrections: tuple[str, ...] = ()) -> ZipItPreTrainedModel:
    experts = dict(zip(TASKS, pair("vit"), strict=True))
    pixels = torch.tensor(DATA["clothes"]["pixel_values"])
    return hf_zipit.merge(experts, pixels, method="zip", depth=0.5, corrections=corrections, batch_size=16)


def arguments(folder: Path, **settings: object) -> TrainingArguments:
    return TrainingArguments(
        str(folder), per_device_train_batch_size=8, max_steps=12, learning_rate=3e-3, logging_steps=1, save_steps=6,
        report_to=[], use_cpu=True, disable_tqdm=True, seed=0, **settings,
    )  # fmt: skip


def parts(model: ZipItPreTrainedModel) -> dict[str, list[torch.nn.Parameter]]:
    """The trainable tensors of the trunk and of every branch."""
    found = {"trunk": list(model.trunk.parameters())}
    return found | {task: list(branch.parameters()) for task, branch in model.branches.items()}


@pytest.mark.parametrize("joint", [False, True], ids=["own labels", "joint labels"])
@pytest.mark.parametrize("corrections", [(), ("rescale-shift",)], ids=["plain", "corrected"])
def test_gradients_reach_the_trunk_and_every_branch(joint: bool, corrections: tuple[str, ...]) -> None:
    model = merged(corrections)
    sets = hf_zipit.task_datasets(model, DATA, joint=joint)
    batch = concatenate_datasets(list(sets.values())).with_format("torch")[:]
    model.train()(**batch).loss.backward()
    for name, parameters in parts(model).items():
        assert parameters, name
        reached = [p for p in parameters if p.grad is not None and p.grad.abs().max() > 0]
        assert len(reached) == len(parameters), name


@pytest.fixture(scope="module", params=[False, True], ids=["own labels", "joint labels"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A merged model before and after a few steps, with its trainer."""
    folder = tmp_path_factory.mktemp("trained")
    model = merged()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sets = hf_zipit.task_datasets(model, DATA, joint=request.param)
    trainer = Trainer(model=model, args=arguments(folder), train_dataset=concatenate_datasets(list(sets.values())))
    trainer.train()
    return before, model, trainer, folder


def test_the_loss_falls(trained) -> None:
    _, _, trainer, _ = trained
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 12
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


def test_every_part_moves(trained) -> None:
    before, model, _, _ = trained
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    for part in ("trunk.", "branches.clothes.", "branches.shoes."):
        assert any(name.startswith(part) for name in moved), part


@torch.no_grad()
def test_checkpoints_load_again(trained, tmp_path: Path) -> None:
    _, model, trainer, folder = trained
    pixels = torch.tensor(DATA["shoes"]["pixel_values"])
    last = AutoModelForImageClassification.from_pretrained(folder / "checkpoint-12")
    model.eval()
    for task in (None, *TASKS):
        assert torch.equal(last(pixel_values=pixels, task=task).logits, model(pixel_values=pixels, task=task).logits)
    trainer.save_model(str(tmp_path / "final"))
    final = AutoModelForImageClassification.from_pretrained(tmp_path / "final")
    assert torch.equal(final(pixel_values=pixels).logits, model(pixel_values=pixels).logits)


def test_training_resumes_from_a_checkpoint(trained) -> None:
    _, model, first, folder = trained
    again = Trainer(model=merged(), args=arguments(folder), train_dataset=first.train_dataset)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-6"))
    for name, tensor in again.model.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], msg=name)


def test_a_frozen_trunk_stays(tmp_path: Path) -> None:
    model = merged()
    model.trunk.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sets = hf_zipit.task_datasets(model, DATA)
    Trainer(model=model, args=arguments(tmp_path), train_dataset=concatenate_datasets(list(sets.values()))).train()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and not any(name.startswith("trunk.") for name in moved)
