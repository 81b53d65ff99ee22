"""`transformers.pipeline` runs merged models as any other: jointly as they are, for one task through `for_task`."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline

from hf_zipit.errors import ZipItError
from hf_zipit.modeling import ZipItPreTrainedModel
from hf_zipit.modeling.joint import vote
from tests.processors import clip_image_processor, image_processor, tokenizer

from .by_hand import CLIP, FAMILIES, LABELS, make_experts, make_inputs, merge_by_hand

TEXTS = ["the red boot", "a photo of the blue cap"]
IMAGES = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (20, 20, 3), np.uint8)) for i in range(2)]


def merged(family: str, **changes: object) -> tuple[dict, ZipItPreTrainedModel]:
    shared = FAMILIES[family].part
    experts = make_experts(family, shared)
    return experts, merge_by_hand(experts, shared, **changes)


@pytest.fixture(autouse=True)
def no_errors_are_logged(caplog: pytest.LogCaptureFixture):
    """A pipeline that does not know a class only logs so."""
    import transformers

    logger = transformers.logging.get_logger("transformers")
    propagates, logger.propagate = logger.propagate, True
    yield
    logger.propagate = propagates
    assert not [r.getMessage() for r in caplog.get_records("call") if r.levelname == "ERROR"]


def scores(found: list[dict]) -> dict[str, float]:
    return {answer["label"]: answer["score"] for answer in found}


def test_image_classification() -> None:
    experts, model = merged("vit")
    joint = pipeline("image-classification", model=model, image_processor=image_processor(), top_k=9)
    for found, image in zip(joint(IMAGES), IMAGES, strict=True):
        pixels = image_processor()(images=image, return_tensors="pt").pixel_values
        with torch.no_grad():
            expected = model(pixel_values=pixels).logits.softmax(-1)[0].tolist()
        assert scores(found) == pytest.approx(dict(zip([*LABELS["clothes"], *LABELS["shoes"]], expected, strict=True)))
    for task, expert in experts.items():
        one = pipeline("image-classification", model=model.for_task(task), image_processor=image_processor())
        alone = pipeline("image-classification", model=expert, image_processor=image_processor())
        assert set(scores(one(IMAGES[0]))) == set(LABELS[task])
        assert one(IMAGES) == alone(IMAGES)


def test_text_classification() -> None:
    experts, model = merged("bert")
    joint = pipeline("text-classification", model=model, tokenizer=tokenizer(), top_k=None)
    assert set(scores(joint(TEXTS)[0])) == {*LABELS["clothes"], *LABELS["shoes"]}
    for task, expert in experts.items():
        one = pipeline("text-classification", model=model.for_task(task), tokenizer=tokenizer())
        assert one(TEXTS) == pipeline("text-classification", model=expert, tokenizer=tokenizer())(TEXTS)


def test_token_classification() -> None:
    experts, model = merged("bert-tokens")
    for task, expert in experts.items():
        one = pipeline("token-classification", model=model.for_task(task), tokenizer=tokenizer())
        assert one(TEXTS[0]) == pipeline("token-classification", model=expert, tokenizer=tokenizer())(TEXTS[0])


def test_fill_mask() -> None:
    experts, model = merged("bert-lm")
    text = "the red [MASK]"
    found = pipeline("fill-mask", model=model, tokenizer=tokenizer(), top_k=3)(text)
    inputs = tokenizer()(text, return_tensors="pt")
    with torch.no_grad():
        logits = vote([expert(**inputs).logits for expert in experts.values()])[0, 3].softmax(-1)
    assert [answer["token"] for answer in found] == logits.topk(3).indices.tolist()
    for task, expert in experts.items():
        one = pipeline("fill-mask", model=model.for_task(task), tokenizer=tokenizer())
        assert one(text) == pipeline("fill-mask", model=expert, tokenizer=tokenizer())(text)


def test_feature_extraction() -> None:
    experts, model = merged("bert-features")
    joint = pipeline("feature-extraction", model=model, tokenizer=tokenizer())(TEXTS[0], return_tensors=True)
    own = []
    for task, expert in experts.items():
        one = pipeline("feature-extraction", model=model.for_task(task), tokenizer=tokenizer())
        alone = pipeline("feature-extraction", model=expert, tokenizer=tokenizer())
        own.append(alone(TEXTS[0], return_tensors=True))
        assert torch.equal(one(TEXTS[0], return_tensors=True), own[-1])
    assert torch.equal(joint, torch.cat(own, -1))


def test_zero_shot_image_classification() -> None:
    shared = FAMILIES["clip"].part
    experts = make_experts("clip", shared)
    # Where a text ends is what CLIP pools; this tokenizer's end is [SEP].
    for expert in experts.values():
        expert.config.text_config.eos_token_id = expert.text_model.eos_token_id = 3
    model = merge_by_hand(experts, shared)
    parts = {"tokenizer": tokenizer(CLIP["text_config"]["max_position_embeddings"])}
    parts["image_processor"] = clip_image_processor()
    ask = {"candidate_labels": ["boot", "cap", "red shirt"], "hypothesis_template": "a photo of {}"}
    similarity = []
    for task, expert in experts.items():
        one = pipeline("zero-shot-image-classification", model=model.for_task(task), **parts)(IMAGES[0], **ask)
        alone = pipeline("zero-shot-image-classification", model=expert, **parts)(IMAGES[0], **ask)
        assert one == alone
        texts = parts["tokenizer"]([f"a photo of {x}" for x in ask["candidate_labels"]], padding=True)
        with torch.no_grad():
            found = expert(
                pixel_values=parts["image_processor"](images=[IMAGES[0]], return_tensors="pt").pixel_values,
                input_ids=torch.tensor(texts["input_ids"]),
                attention_mask=torch.tensor(texts["attention_mask"]),
            )
        similarity.append(found.logits_per_image[0])
    joint = pipeline("zero-shot-image-classification", model=model, **parts)(IMAGES[0], **ask)
    expected = torch.stack(similarity).mean(0).softmax(-1).tolist()
    assert scores(joint) == pytest.approx(dict(zip(ask["candidate_labels"], expected, strict=True)))


# ------------------------------------------------------------------------------------------------------- the views


@torch.no_grad()
def test_a_view_answers_for_its_task_and_shares_every_tensor() -> None:
    _, model = merged("vit")
    before, inputs = copy.deepcopy(model.config.to_dict()), make_inputs("vit")
    view = model.for_task("shoes")
    assert torch.equal(view(**inputs).logits, model(**inputs, task="shoes").logits)
    assert torch.equal(view(**inputs, task="clothes").logits, model(**inputs, task="clothes").logits)
    assert torch.equal(view.for_task(None)(**inputs).logits, model(**inputs).logits)
    assert view.config.id2label == {0: "boot", 1: "sandal"}
    assert view.for_task(None).config.id2label == model.config.id2label
    assert model.config.to_dict() == before
    assert [p.data_ptr() for p in view.parameters()] == [p.data_ptr() for p in model.parameters()]
    next(view.parameters()).mul_(2)
    assert torch.equal(view(**inputs).logits, model(**inputs, task="shoes").logits)
    with pytest.raises(ZipItError, match="did you mean 'shoes'"):
        model.for_task("shoe")


@torch.no_grad()
def test_a_view_of_a_dispatched_model_runs_as_itself() -> None:
    _, model = merged("vit")
    add_hook_to_module(model, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    inputs = make_inputs("vit")
    view = model.for_task("shoes")
    assert view(**inputs).logits.shape[-1] == 2
    assert model(**inputs).logits.shape[-1] == 5
    assert view._hf_hook is model._hf_hook


@torch.no_grad()
def test_a_merged_model_loads_for_a_task(tmp_path: Path) -> None:
    _, model = merged("vit")
    inputs = make_inputs("vit")
    model.save_pretrained(tmp_path / "joint")
    model.for_task("shoes").save_pretrained(tmp_path / "shoes")
    chosen = AutoModelForImageClassification.from_pretrained(tmp_path / "joint", task="shoes")
    for loaded in (chosen, AutoModelForImageClassification.from_pretrained(tmp_path / "shoes")):
        assert loaded.config.id2label == {0: "boot", 1: "sandal"}
        assert torch.equal(loaded(**inputs).logits, model(**inputs, task="shoes").logits)
        assert torch.equal(loaded.for_task(None)(**inputs).logits, model(**inputs).logits)
    with pytest.raises(ZipItError, match="'hats' is unknown"):
        AutoModelForImageClassification.from_pretrained(tmp_path / "joint", task="hats")
    image_processor().save_pretrained(tmp_path / "joint")
    image_processor().save_pretrained(tmp_path / "shoes")
    assert len(pipeline("image-classification", str(tmp_path / "joint"))(IMAGES[0])) == 5
    assert len(pipeline("image-classification", str(tmp_path / "shoes"))(IMAGES[0])) == 2
