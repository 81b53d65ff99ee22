"""A claim that holds is said to hold, and one that does not is found, whichever it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from safetensors.torch import load_file, save_file

import hf_zipit
from hf_zipit.errors import RecipeError
from hf_zipit.evaluation.measure import accuracy
from hf_zipit.recipe.sections import Data, ExpertEntry, Recipe
from hf_zipit.report.card import Result, remember
from hf_zipit.running.run import run_recipe
from hf_zipit.running.saved import load_merged
from hf_zipit.running.verify import verify
from tests import tiny

NAMES = {"a": ["cat", "dog"], "b": ["one", "two", "three"]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator, names = torch.Generator().manual_seed(0), [name for own in NAMES.values() for name in own]
    pixels = torch.randn(30, 3, 16, 16, generator=generator).tolist()
    kinds = Features(
        {"pixel_values": Sequence(Sequence(Sequence(Value("float32")))), "label": ClassLabel(names=names)}
    )
    folder = tmp_path_factory.mktemp("data") / "pictures"
    Dataset.from_dict({"pixel_values": pixels, "label": [i % 5 for i in range(30)]}, kinds).save_to_disk(folder)
    return folder


@pytest.fixture
def merged(tmp_path: Path, data: Path) -> Path:
    """A merged model whose scores were measured on all rows."""
    for seed, (task, names) in enumerate(NAMES.items()):
        labels = dict(enumerate(names))
        expert = tiny.build("vit", seed, id2label=labels, label2id={name: i for i, name in labels.items()})
        expert.save_pretrained(tmp_path / task)
        (tmp_path / task / "README.md").write_text("---\nlicense: mit\n---\n")
    model = hf_zipit.merge({task: tmp_path / task for task in NAMES}, method="identity")
    rows = Dataset.load_from_disk(data).with_format("torch")
    parts = {task: [i for i, label in enumerate(rows["label"]) if (label < 2) == (task == "a")] for task in NAMES}
    tests = {
        task: [
            {"pixel_values": rows[i]["pixel_values"], "labels": int(rows[i]["label"]) - 2 * (task == "b")} for i in p
        ]
        for task, p in parts.items()
    }
    origins = {task: str(tmp_path / task) for task in NAMES}
    remember(model, Result("both", origins, dataset=str(data), split="train", merged=accuracy(model, tests)))
    model.save_pretrained(tmp_path / "merged")
    return tmp_path / "merged"


def wrong(folder: Path, data: Path | None = None) -> list[str]:
    """What does not hold."""
    checks = verify(str(folder), data and Data(str(data), "train"))
    assert all(check.remedy for check in checks if not check.good)
    return [check.what for check in checks if not check.good]


def test_every_claim_of_an_untouched_model_holds(merged: Path, data: Path):
    checks = verify(str(merged), Data(str(data), "train"))
    assert [check.what for check in checks] == [
        "weights", "expert a", "expert b", "recipe", "licence", "accuracy a", "accuracy b",
    ]  # fmt: skip
    assert all(check.good for check in checks), checks
    assert checks[4].found == "mit"


def test_each_claim_that_does_not_hold_is_found(merged: Path, data: Path):
    card, recipe, experts = merged / "README.md", merged / "recipe.yaml", merged.parent
    card.write_text(card.read_text().replace("license: mit", "license: cc0-1.0"))
    recipe.write_text(recipe.read_text().replace("method: identity", "method: zip"))
    (experts / "b" / "config.json").unlink()
    tensors = load_file(experts / "a" / "model.safetensors")
    tensors["classifier.bias"] += 1
    save_file(tensors, experts / "a" / "model.safetensors", {"format": "pt"})
    assert wrong(merged) == ["expert a", "expert b", "recipe", "licence"]


def test_changed_weights_and_scores_that_were_made_up_are_found(merged: Path, data: Path):
    model = load_merged(str(merged))
    model.config.method["results"]["merged"]["per_task"]["b"] += 0.2
    model.config.save_pretrained(merged)
    assert wrong(merged, data) == ["accuracy b"]
    model.trunk.vit.embeddings.cls_token.data += 1
    model.save_pretrained(merged)
    assert "weights" in wrong(merged)


def test_a_card_says_what_the_run_emitted(tmp_path: Path):
    pytest.importorskip("codecarbon")
    for seed, task in enumerate(NAMES):
        tiny.build("vit", seed, num_labels=2).save_pretrained(tmp_path / task)
    experts = {task: ExpertEntry(model=str(tmp_path / task)) for task in NAMES}
    recipe = Recipe(name="both", experts=experts, method=("average",), output=tmp_path / "out")
    with pytest.raises(RecipeError, match="no country 'Atlantis'"):
        run_recipe(recipe, co2="Atlantis")
    assert "co2" not in (run_recipe(recipe).model / "README.md").read_text()
    card = (run_recipe(recipe, co2="fra").model / "README.md").read_text()
    told = yaml.safe_load(card.split("---")[1])["co2_eq_emissions"]
    assert 0 < told["emissions"] < 100 and told["geographical_location"] == "France"
    assert "g of CO2 equivalents (France, estimated by codecarbon" in card
