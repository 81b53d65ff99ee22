"""Choosing tasks, joint logits, and losses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hf_zipit.errors import ZipItError
from hf_zipit.modeling import ZipItForImageClassification
from hf_zipit.modeling.joint import joint_embedding, joint_loss, vote

from .by_hand import FAMILIES, LABELS, make_expert, make_experts, make_inputs, merge_by_hand

MIN = torch.finfo(torch.float32).min


def merged_vit(tasks: int = 3) -> ZipItForImageClassification:
    shared = FAMILIES["vit"].part
    return merge_by_hand(make_experts("vit", shared, tasks), shared)


def same_labels(family: str) -> dict[str, object]:
    return {task: make_expert(family, seed, LABELS["shoes"]) for seed, task in enumerate(("old", "new"))}


@torch.no_grad()
def test_an_unknown_task_is_told_with_a_suggestion() -> None:
    with pytest.raises(ZipItError, match="'shoe' is unknown; did you mean 'shoes'"):
        merged_vit()(**make_inputs("vit"), task="shoe")
    with pytest.raises(ZipItError, match="'trees' is unknown; choose one of"):
        merged_vit()(**make_inputs("vit"), task=["shoes", "trees", "hats"])
    with pytest.raises(ZipItError, match="'-1' is unknown"):
        merged_vit()(**make_inputs("vit"), task=torch.tensor([0, -1, 1]))


@torch.no_grad()
@pytest.mark.parametrize("task", [["shoes"] * 3, ("shoes",) * 3, torch.tensor([1, 1, 1])])
def test_a_column_of_one_task_is_that_task(task: object) -> None:
    merged, inputs = merged_vit(), make_inputs("vit")
    assert torch.equal(merged(**inputs, task=task).logits, merged(**inputs, task="shoes").logits)


@torch.no_grad()
@pytest.mark.parametrize("task", [["shoes", "hats", "clothes"], torch.tensor([1, 2, 0])])
def test_in_a_mixed_batch_foreign_classes_are_masked(task: object) -> None:
    merged, inputs = merged_vit(), make_inputs("vit")
    joint, mixed = merged(**inputs).logits, merged(**inputs, task=task).logits
    for row, (start, stop) in enumerate([(3, 5), (5, 9), (0, 3)]):
        own = torch.zeros(9, dtype=torch.bool)
        own[start:stop] = True
        assert torch.equal(mixed[row, own], joint[row, own])
        assert bool((mixed[row, ~own] == MIN).all())


@torch.no_grad()
def test_labels_of_a_mixed_batch_are_the_tasks_own() -> None:
    merged, inputs = merged_vit(), make_inputs("vit")
    tasks, labels = ["shoes", "hats", "clothes"], torch.tensor([1, 3, 2])
    found = merged(**inputs, task=tasks, labels=labels).loss
    own = [
        merged(pixel_values=inputs["pixel_values"][row : row + 1], task=task, labels=labels[row : row + 1]).loss
        for row, task in enumerate(tasks)
    ]
    torch.testing.assert_close(found, torch.stack(own).mean())


@torch.no_grad()
def test_joint_labels_are_ids_of_the_union(family: str) -> None:
    if not FAMILIES[family].labelled:
        pytest.skip("has no labels")
    merged = merge_by_hand(make_experts(family))
    inputs = make_inputs(family)
    logits = merged(**inputs).logits
    labels = torch.arange(logits[..., 0].numel()).view(logits.shape[:-1]) % logits.shape[-1]
    found = merged(**inputs, labels=labels)
    torch.testing.assert_close(found.loss, functional.cross_entropy(logits.flatten(0, -2), labels.flatten()))
    assert next(iter(found)) == "loss"  # Trainer takes the loss from position 0
    assert torch.equal(found.logits, logits)


@torch.no_grad()
def test_the_loss_of_one_task_is_its_experts(family: str) -> None:
    experts = make_experts(family)
    merged = merge_by_hand(experts)
    inputs = make_inputs(family)
    if family in ("clip", "bert-features"):
        pytest.skip("has no labels")
    for task, expert in experts.items():
        shape = expert(**inputs).logits.shape
        labels = torch.arange(math.prod(shape[:-1])).view(shape[:-1]) % shape[-1]
        if labels.dim() > 1:
            labels[:, 0] = -100
        assert torch.equal(merged(**inputs, task=task, labels=labels).loss, expert(**inputs, labels=labels).loss)


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert-tokens", "bert-lm"])
def test_ignored_positions_do_not_count(family: str) -> None:
    merged = merge_by_hand(make_experts(family))
    inputs = make_inputs(family)
    labels = torch.full((3, 6), -100)
    labels[1, 2], labels[2, 4] = 1, 0
    wanted = functional.cross_entropy(merged(**inputs).logits[[1, 2], [2, 4]], torch.tensor([1, 0]))
    torch.testing.assert_close(merged(**inputs, labels=labels).loss, wanted)
    mixed = merged(**inputs, labels=labels, task=["clothes", "shoes", "clothes"]).loss
    own = [
        merged(**inputs, task=task).logits[row, column].log_softmax(-1)[label]
        for task, row, column, label in (("shoes", 1, 2, 1), ("clothes", 2, 4, 0))
    ]
    torch.testing.assert_close(mixed, -torch.stack(own).mean())


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit", "bert", "bert-lm"])
def test_tasks_with_the_same_classes_vote(family: str) -> None:
    experts = same_labels(family)
    merged = merge_by_hand(experts)
    inputs = make_inputs(family)
    mean = torch.stack([expert(**inputs).logits.softmax(-1) for expert in experts.values()]).mean(0)
    torch.testing.assert_close(merged(**inputs).logits, mean.log())
    mixed = merged(**inputs, task=["old", "new", "old"]).logits
    for row, task in enumerate(["old", "new", "old"]):
        assert torch.equal(mixed[row], experts[task](**inputs).logits[row])


def test_voting_with_oneself_changes_no_probability() -> None:
    logits = torch.randn(4, 5)
    torch.testing.assert_close(vote([logits] * 3).softmax(-1), logits.softmax(-1))
    assert torch.equal(vote([logits, logits], "regression"), logits)
    assert torch.equal(vote([logits[:, :1], logits[:, 1:2]]), (logits[:, :1] + logits[:, 1:2]) / 2)


@torch.no_grad()
@pytest.mark.parametrize("problem_type", ["regression", "multi_label_classification"])
def test_other_problems_are_as_in_transformers(problem_type: str) -> None:
    experts = make_experts("bert")
    merged = merge_by_hand(experts, problem_type=problem_type)
    inputs = make_inputs("bert")
    for task, expert in experts.items():
        expert.config.problem_type = problem_type
        labels = torch.rand(3, expert.config.num_labels)
        assert torch.equal(merged(**inputs, task=task, labels=labels).loss, expert(**inputs, labels=labels).loss)
    labels = torch.rand(3, 5)
    loss = {
        "regression": functional.mse_loss,
        "multi_label_classification": functional.binary_cross_entropy_with_logits,
    }
    assert torch.equal(merged(**inputs, labels=labels).loss, loss[problem_type](merged(**inputs).logits, labels))


def test_joint_float_labels_need_a_problem_type() -> None:
    with pytest.raises(ZipItError, match="problem_type"):
        joint_loss(torch.randn(2, 3), torch.randn(2, 3))


def test_joint_embeddings_have_the_mean_of_the_tasks_similarities() -> None:
    images, texts = [torch.randn(4, 6), torch.randn(4, 3)], [torch.randn(5, 6), torch.randn(5, 3)]
    similarity = [
        functional.normalize(a, dim=-1) @ functional.normalize(b, dim=-1).T for a, b in zip(images, texts, strict=True)
    ]
    found = joint_embedding(images) @ joint_embedding(texts).T
    torch.testing.assert_close(found, torch.stack(similarity).mean(0))


@torch.no_grad()
def test_clip_features_one_task_and_joint() -> None:
    shared = FAMILIES["clip"].whole
    experts = make_experts("clip", shared)
    merged = merge_by_hand(experts, shared)
    inputs = make_inputs("clip")
    pixels = inputs.pop("pixel_values")
    images, texts = [], []
    for task, expert in experts.items():
        images.append(expert.get_image_features(pixels).pooler_output)
        texts.append(expert.get_text_features(**inputs).pooler_output)
        assert torch.equal(merged.get_image_features(pixels, task=task).pooler_output, images[-1])
        assert torch.equal(merged.get_text_features(**inputs, task=task).pooler_output, texts[-1])
    assert torch.equal(merged.get_image_features(pixels).pooler_output, joint_embedding(images))
    assert torch.equal(merged.get_text_features(**inputs).pooler_output, joint_embedding(texts))
    with pytest.raises(ZipItError, match="no common features"):
        merged.get_image_features(pixels, task=["clothes", "shoes", "clothes"])


@torch.no_grad()
def test_a_model_without_embeddings_says_so() -> None:
    with pytest.raises(ZipItError, match="BertModel models has no get_image_features"):
        merge_by_hand(make_experts("bert-features")).get_image_features(torch.zeros(1))


@torch.no_grad()
def test_as_many_task_names_as_samples() -> None:
    with pytest.raises(ZipItError, match="2 task names came with a batch of 3"):
        merged_vit()(**make_inputs("vit"), task=["shoes", "hats"])


@torch.no_grad()
def test_tuples_where_they_are_asked_for(family: str) -> None:
    merged = merge_by_hand(make_experts(family))
    inputs = make_inputs(family)
    for task in (None, "shoes"):
        found = merged(**inputs, task=task, return_dict=False)
        assert isinstance(found, tuple)
        assert isinstance(found[0], Tensor)
        assert torch.equal(found[0], merged(**inputs, task=task)[0])


@torch.no_grad()
def test_unknown_keywords_reach_the_source_model() -> None:
    merged = merged_vit()
    larger = torch.randn(1, 3, 24, 24)
    assert merged(pixel_values=larger, interpolate_pos_encoding=True).logits.shape == (1, 9)
    with pytest.raises(ValueError, match="doesn't match model"):
        merged(pixel_values=larger)
