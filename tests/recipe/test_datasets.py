"""`datasets` in: columns of other names, streams, raw images and texts; in Python and in recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, IterableDataset, Value
from PIL import Image as Picture
from transformers import PreTrainedModel

import hf_zipit
from hf_zipit.data.calibration import Calibration
from hf_zipit.errors import DataError, RecipeError
from hf_zipit.recipe.loading import load_recipe
from hf_zipit.recipe.sources import load_source, part_of, rename
from hf_zipit.running.data import merged_task_data, recipe_data
from hf_zipit.running.experts import recipe_experts
from hf_zipit.running.run import run_recipe
from tests.processors import clip_image_processor, image_processor, tokenizer
from tests.tiny import build

NAMES = {"clothes": ["shirt", "coat", "dress"], "shoes": ["boot", "sandal"]}
ALL = [name for names in NAMES.values() for name in names]
TEXTS = ["the red boot", "a photo of the blue cap", "boot", "the shirt", "red red cap"]


def pictures(count: int = 10, name: str = "image", label: str = "labels") -> Dataset:
    """Pictures of noise, of all classes in turn."""
    generator = np.random.default_rng(0)
    noise = [Picture.fromarray(generator.integers(0, 256, (20, 20, 3), dtype=np.uint8)) for _ in range(count)]
    features = Features({name: Image(), label: ClassLabel(names=ALL)})
    return Dataset.from_dict({name: noise, label: [i % len(ALL) for i in range(count)]}, features=features)


def texts(name: str = "text", label: str = "labels") -> Dataset:
    features = Features({name: Value("string"), label: ClassLabel(names=ALL)})
    return Dataset.from_dict({name: TEXTS, label: list(range(5))}, features=features)


def experts(kind: str, **settings: Any) -> dict[str, PreTrainedModel]:
    """Two tiny experts whose labels are those of `NAMES`."""
    return {
        task: build(
            kind, seed, id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)}, **settings
        )
        for seed, (task, names) in enumerate(NAMES.items())
    }


def same(left: PreTrainedModel, right: PreTrainedModel) -> bool:
    ours, theirs = left.state_dict(), right.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def own_part(data: Dataset, task: str) -> Dataset:
    return part_of(data, [ALL.index(name) for name in NAMES[task]])


KINDS = {"image": ("vit", pictures, image_processor), "text": ("bert-sequence", texts, tokenizer)}
READY = {"image": "pixel_values", "text": "input_ids"}


# ---------------------------------------------------------------------------------------------------------- in Python


@pytest.mark.parametrize("kind", KINDS)
def test_columns_and_streams_change_nothing_for_a_merge(kind: str) -> None:
    name, data, processor = KINDS[kind]
    models, plain = experts(name), data().remove_columns("labels")

    def merged(calibration: Any, **settings: Any) -> PreTrainedModel:
        return hf_zipit.merge(models, calibration, method="permute", processor=processor(), batch_size=4, **settings)

    expected = merged(plain)
    renamed = plain.rename_column(kind, "what_it_shows")
    assert same(merged(renamed, columns={"what_it_shows": kind}), expected)
    assert same(merged(plain.to_iterable_dataset()), expected)
    assert same(merged(renamed.to_iterable_dataset(), columns={"what_it_shows": kind}), expected)
    with pytest.raises(DataError, match="what_it_shows.*rename a column"):
        merged(renamed)
    # One mapping serves tasks whose data differ.
    by_task = {"clothes": plain, "shoes": renamed}
    assert same(merged(by_task, columns={"what_it_shows": kind}), merged({"clothes": plain, "shoes": plain}))


@pytest.mark.parametrize("refit", [False, True])
def test_every_pass_of_a_merge_reads_the_columns(refit: bool) -> None:
    models, pixels = experts("vit"), torch.randn(12, 3, 16, 16)
    settings = {"refit": refit, "corrections": ["rescale-shift"], "method": "zip"}
    expected = hf_zipit.merge(models, pixels, **settings)
    data = Dataset.from_dict({"img": pixels.numpy()}).to_iterable_dataset()
    assert same(hf_zipit.merge(models, data, columns={"img": "pixel_values"}, **settings), expected)


def test_any_kind_of_data_may_be_renamed() -> None:
    model, pixels = build("vit"), torch.randn(6, 3, 16, 16)
    kinds = {
        "dict of tensors": {"x": pixels, "pixel_values": torch.zeros(6, 3, 16, 16)},
        "rows": [{"x": row, "junk": 1} for row in pixels],
        "batches": [{"x": part} for part in pixels.split(3)],
        "by task": {"a": {"x": pixels[:3]}, "b": [{"x": row} for row in pixels[3:]]},
    }
    for name, data in kinds.items():
        calibration = Calibration(data, columns={"x": "pixel_values"}, batch_size=3).read({"a": model, "b": model})
        batches = calibration.batches()
        assert torch.equal(torch.cat([batch.inputs["pixel_values"] for batch in batches]), pixels), name


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_takes_raw_renamed_and_streamed_data(kind: str, stream: bool) -> None:
    name, data, processor = KINDS[kind]
    models = experts(name)
    raw = {task: own_part(data(), task) for task in NAMES}
    prepare = processor()

    def ready(rows: dict[str, Any]) -> dict[str, Any]:
        return dict(prepare(images=rows["image"]) if kind == "image" else prepare(text=rows["text"], padding=True))

    prepared = {
        task: part.map(ready, batched=True, remove_columns=[kind]).with_format("torch") for task, part in raw.items()
    }
    expected = hf_zipit.evaluate(models, prepared, metrics="f1")
    renamed = {task: part.rename_columns({kind: "x", "labels": "y"}) for task, part in raw.items()}
    if stream:
        renamed = {task: part.to_iterable_dataset() for task, part in renamed.items()}
    found = hf_zipit.evaluate(
        models, renamed, metrics="f1", processor=prepare, columns={"x": kind, "y": "labels"}, batch_size=2
    )
    assert found.model == expected.model
    assert found.scores == expected.scores
    with pytest.raises(DataError, match="evaluation data of the task 'clothes' has the columns"):
        hf_zipit.evaluate(models, renamed, processor=prepare)


def test_texts_of_any_length_are_padded() -> None:
    models = experts("bert-sequence", pad_token_id=0)
    rows = [{"input_ids": tokenizer()(text)["input_ids"], "label": i % 2} for i, text in enumerate(TEXTS)]
    singly = hf_zipit.evaluate(models, {"shoes": rows}, batch_size=1)
    assert hf_zipit.evaluate(models, {"shoes": rows}, batch_size=5) == singly


def test_contrastive_models_take_images_with_captions() -> None:
    from transformers import CLIPProcessor

    processor = CLIPProcessor(image_processor=clip_image_processor(), tokenizer=tokenizer())
    models = {"a": build("clip", 0), "b": build("clip", 1)}
    data = Dataset.from_dict({"img": pictures(5)["image"], "caption": TEXTS})
    columns = {"img": "image", "caption": "text"}
    merged = hf_zipit.merge(models, data, processor=processor, columns=columns, method="permute")
    found = hf_zipit.evaluate(
        merged, {"a": data, "b": data.to_iterable_dataset()}, metrics="retrieval_recall", processor=processor,
        columns=columns,
    )  # fmt: skip
    assert set(found.scores) == {"a", "b"}
    assert 0 <= found.scores["a"]["recall@1"] <= 1


# --------------------------------------------------------------------------------------------------------- the sources


def test_columns_of_a_source_are_renamed(tmp_path: Path) -> None:
    pictures(name="img", label="fine_label").save_to_disk(tmp_path / "data")
    with pytest.raises(DataError, match="no column labels or label.*say in `columns`"):
        load_source(str(tmp_path / "data"))
    for stream in (False, True):
        data = load_source(str(tmp_path / "data"), columns={"img": "image", "fine_label": "labels"}, streaming=stream)
        assert isinstance(data, IterableDataset) == stream
        assert set(data.column_names) == {"image", "labels"}
        assert data.features["labels"].names == ALL
    with pytest.raises(DataError, match="has none of the columns"):
        load_source(str(tmp_path / "data"), columns={"imgg": "image"})
    both = Dataset.from_dict({"a": [1], "b": [2]})
    assert rename(both, {"a": "b"}, "x")[0] == {"b": 1}
    assert rename(both, {"a": "b", "b": "a"}, "x")[0] == {"b": 1, "a": 2}


def test_a_part_of_a_stream_is_seeded_and_of_its_classes(tmp_path: Path) -> None:
    pictures(50).save_to_disk(tmp_path / "data")
    whole = load_source(str(tmp_path / "data"), streaming=True)
    ids = [ALL.index("boot"), ALL.index("sandal")]
    parts = [part_of(whole, ids, ["boot", "sandal"], samples=8, seed=seed) for seed in (0, 0, 1)]
    first, again, other = ([np.asarray(image).tobytes() for image in part["image"]] for part in parts)
    assert first == again != other
    assert len(set(first)) == 8
    assert set(parts[0]["labels"]) == {0, 1}
    assert parts[0].features["labels"].names == ["boot", "sandal"]
    whole_part = part_of(load_source(str(tmp_path / "data")), ids)
    assert {np.asarray(image).tobytes() for image in whole_part["image"]} >= set(first)


def test_a_stream_without_named_classes_is_refused(tmp_path: Path) -> None:
    Dataset.from_dict({"text": ["a"], "label": [1]}).save_to_disk(tmp_path / "data")
    with pytest.raises(DataError, match="no names of classes; read it unstreamed"):
        load_source(str(tmp_path / "data"), streaming=True)


# --------------------------------------------------------------------------------------------------------- in recipes


@pytest.fixture(scope="module", params=["image", "text"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Experts with their processor, and each task's data set, with other columns and splits."""
    folder = tmp_path_factory.mktemp("saved")
    name, data, processor = KINDS[request.param]
    for task, model in experts(name).items():
        model.save_pretrained(folder / task)
        processor().save_pretrained(folder / task)
        part = own_part(data(), task)
        if task == "shoes":
            part = part.rename_columns({request.param: "x", "labels": "y"})
        DatasetDict({"train": part, "test" if task == "clothes" else "held_out": part}).save_to_disk(
            folder / f"{task}-data"
        )
    return folder, request.param


def recipe_of(folder: Path, kind: str, **calibration: Any) -> dict[str, Any]:
    shoes = {
        "dataset": str(folder / "shoes-data"),
        "columns": {"x": kind, "y": "labels"},
        "splits": {"test": "held_out"},
    }
    return {
        "name": "own-data",
        "experts": {
            "clothes": {"model": str(folder / "clothes"), "data": {"dataset": str(folder / "clothes-data")}},
            "shoes": {"model": str(folder / "shoes"), "data": shoes},
        },
        "calibration": {"samples": 4, "batch_size": 2, **calibration},
        "evaluation": {"split": "test"},
        "method": "permute",
    }


def loaded(tmp_path: Path, content: dict[str, Any]):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**content, "output": str(tmp_path / "out")}))
    return load_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("streaming", [False, True])
def test_every_task_may_have_its_own_data_set(saved, tmp_path: Path, streaming: bool) -> None:
    folder, kind = saved
    recipe = loaded(tmp_path, recipe_of(folder, kind, streaming=streaming))
    data = recipe_data(recipe, recipe.calibration, recipe_experts(recipe, lambda _: None, train=False))
    for task, part in data.items():
        assert set(part.column_names) >= {READY[kind], "labels"}
        assert part.features["labels"].names == NAMES[task]
        assert len(part) == min(4, len(own_part(KINDS[kind][1](), task)))
    result = run_recipe(recipe)
    assert set(result.kept.accuracy.per_task) == {"clothes", "shoes"}
    assert "clothes-data" in (result.model / "README.md").read_text()
    assert load_recipe(result.model / "recipe.yaml").experts["shoes"].data == recipe.experts["shoes"].data


def test_wrong_data_sections_are_told(saved, tmp_path: Path) -> None:
    folder, kind = saved
    content = recipe_of(folder, kind, streaming=True, samples=None)
    with pytest.raises(RecipeError, match="calibration.streaming .* calibration.samples"):
        loaded(tmp_path, content)
    content = recipe_of(folder, kind)
    del content["experts"]["shoes"]["data"]["dataset"]
    with pytest.raises(RecipeError, match=r"calibration.dataset is missing; give it, or experts.shoes.data.dataset"):
        loaded(tmp_path, content)
    content["experts"]["shoes"]["data"]["dataset"] = str(folder / "nowhere")
    with pytest.raises(DataError, match="calibration: .* does not exist"):
        loaded(tmp_path, content)


def test_experts_without_classes_are_calibrated_on_what_there_is(tmp_path: Path) -> None:
    for task, seed in {"a": 0, "b": 1}.items():
        build("bert-masked", seed).save_pretrained(tmp_path / task)
    rows = [tokenizer()(text, padding="max_length", max_length=9) for text in TEXTS]
    Dataset.from_list([dict(row) for row in rows]).save_to_disk(tmp_path / "data")
    content = {
        "name": "words",
        "experts": {task: {"model": str(tmp_path / task)} for task in "ab"},
        "calibration": {"dataset": str(tmp_path / "data"), "samples": 3},
        "method": "permute",
    }
    result = run_recipe(loaded(tmp_path, content))
    merged = hf_zipit.modeling.ZipItForMaskedLM.from_pretrained(result.model)
    from hf_zipit.recipe.sections import Data

    parts = merged_task_data(merged, str(result.model), Data(str(tmp_path / "data"), "train"))
    assert {task: len(part) for task, part in parts.items()} == {"a": 5, "b": 5}
