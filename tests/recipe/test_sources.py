"""Data sources: disjoint splits, and task parts that carry the expert's own label ids."""

from __future__ import annotations

import gzip

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from hf_zipit.errors import DataError
from hf_zipit.recipe.sources import choose_classes, load_source, match_labels, part_of, ready


@pytest.fixture(scope="module")
def digits():
    return {split: load_source("sklearn-digits", split) for split in ("train", "validation", "test")}


def test_the_splits_of_digits_are_disjoint_and_cover_everything(digits):
    images = [row.tobytes() for part in digits.values() for row in part.with_format("numpy")["pixel_values"][:]]
    assert len(images) == 1797
    assert len(set(images)) == len(images)


def test_every_split_holds_every_class_in_about_its_share(digits):
    for part in digits.values():
        shares = np.bincount(part.with_format("numpy")["labels"][:], minlength=10) / len(part)
        assert np.all(np.abs(shares - 0.1) < 0.02)


def test_parts_relabel_in_the_given_order(digits):
    whole = digits["test"]
    part = part_of(whole, [7, 2], ["seven", "two"])
    assert part.features["labels"].names == ["seven", "two"]
    labels = whole.with_format("numpy")["labels"][:]
    kept = labels[np.isin(labels, [7, 2])]
    np.testing.assert_array_equal(np.asarray([7, 2])[part.with_format("numpy")["labels"][:]], kept)


def test_parts_of_all_classes_are_the_whole(digits):
    whole = digits["test"]
    parts = [part_of(whole, ids) for ids in ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9])]
    assert sum(map(len, parts)) == len(whole)


def test_labels_are_matched_by_name_and_never_by_position(digits):
    assert match_labels(digits["test"], ["9", "0"], "task") == [9, 0]
    assert match_labels(digits["test"], [f"LABEL_{i}" for i in range(10)], "task") == list(range(10))
    with pytest.raises(DataError, match="label 'ten', which is not a class"):
        match_labels(digits["test"], ["0", "ten"], "task")


def test_classes_by_id_or_name(digits):
    assert choose_classes(digits["test"], [3, "4"], "task") == [3, 4]
    for wrong in ([10], ["ten"], [-1]):
        with pytest.raises(DataError, match="asks for the class"):
            choose_classes(digits["test"], wrong, "task")
    with pytest.raises(DataError, match="twice"):
        choose_classes(digits["test"], [3, "3"], "task")


def test_samples_are_seeded_and_drawn_without_replacement(digits):
    draws = [part_of(digits["test"], [3, 4], samples=50, seed=seed).with_format("numpy") for seed in (0, 0, 1)]
    first, again, other = ([row.tobytes() for row in draw["pixel_values"][:]] for draw in draws)
    assert first == again != other
    assert len(set(first)) == 50
    assert set(draws[0]["labels"][:].tolist()) == {0, 1}
    assert len(part_of(digits["test"], [3, 4], samples=10**6)) == len(part_of(digits["test"], [3, 4]))


def test_an_unknown_split_or_data_set_is_told(digits, tmp_path):
    with pytest.raises(DataError, match="did you mean 'validation'"):
        load_source("sklearn-digits", "validatoin")
    with pytest.raises(DataError, match="cannot be read"):
        load_source("fashion-mnist", "test", folder=tmp_path)


def test_idx_files_are_read(tmp_path):
    images, labels = np.arange(3 * 784, dtype=np.uint8).reshape(3, 28, 28), np.array([9, 0, 4], np.uint8)
    for name, header, array in (("images-idx3", 16, images), ("labels-idx1", 8, labels)):
        with gzip.open(tmp_path / f"t10k-{name}-ubyte.gz", "wb") as file:
            file.write(bytes(header) + array.tobytes())
    data = load_source("fashion-mnist", "test", folder=tmp_path).with_format("numpy")
    np.testing.assert_array_equal(data["labels"][:], labels)
    np.testing.assert_allclose(data["pixel_values"][:][:, 0] * 0.3530 + 0.2860, images / 255, atol=1e-6)
    assert data.features["labels"].names[9] == "Ankle boot"


def test_a_saved_data_set_is_a_source(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features).save_to_disk(tmp_path / "data")
    data = load_source(str(tmp_path / "data"))
    assert list(data["labels"]) == [1, 0]
    with pytest.raises(DataError, match="bring no processor"):
        ready(data, None)


def test_a_data_set_without_labels_is_refused(tmp_path):
    Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "data")
    with pytest.raises(DataError, match="has no column labels or label"):
        load_source(str(tmp_path / "data"))


def test_a_folder_without_data_says_what_would_be_some(tmp_path):
    (tmp_path / "notes.md").write_text("no data\n")
    with pytest.raises(DataError, match="`save_to_disk` wrote") as told:
        load_source(str(tmp_path))
    assert "\n" not in str(told.value)


def test_a_hub_that_does_not_answer_is_told_as_for_models(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'me/pictures' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(DataError, match=r"'me/pictures' \(split 'train'\).*does not answer; check the network"):
        load_source("me/pictures")
