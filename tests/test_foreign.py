"""Somebody else's files: what they say is checked, what they ask for is not done, where they lead is not followed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from torch.ao.quantization import quantize_dynamic
from transformers import PreTrainedModel

import hf_zipit
from hf_zipit import modeling
from hf_zipit.errors import DataError, ExpertError, OutOfMemoryError, OutputError, ZipItError
from hf_zipit.experts.loading import load_expert
from hf_zipit.experts.origins import card_data, origin
from hf_zipit.modeling import hub
from hf_zipit.recipe.sources import load_source
from hf_zipit.running.saved import push_saved

from . import tiny
from .faults.killing import told_by
from .test_bad_input import assert_one_sentence


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An expert, in one file and in shards."""
    root = tmp_path_factory.mktemp("saved")
    tiny.build("vit").save_pretrained(root / "file")
    tiny.build("vit").save_pretrained(root / "shards", max_shard_size="50KB")
    return root


@pytest.fixture
def expert(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved / "file", tmp_path / "expert"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


CONFIGURATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "no model's class": ({"architectures": ["pipeline"]}, "names the class 'pipeline'"),
    "no class": ({"architectures": [None]}, "names no class"),
    "another family": ({"architectures": ["BertForMaskedLM"]}, "of type 'vit', but names the class BertForMaskedLM"),
    "no such type": ({"model_type": "nope"}, "model type `nope`"),
    "no size": ({"hidden_size": None}, "hidden_size"),
    "size 0": ({"patch_size": 0}, "could not be loaded"),
    "negative": ({"hidden_size": -1}, "could not be loaded"),
    "too large": ({"hidden_size": 10**12}, "makes more than 10,.* parameters"),
    "huge": ({"image_size": 65535}, "makes more than 10,.* parameters, but its weights are only .* bytes"),
    "many layers": (
        {"num_hidden_layers": 10**6},
        "makes more than 10,.* parameters, but its weights are only .* bytes",
    ),
    "no end of layers": ({"num_hidden_layers": 10**12}, "num_hidden_layers 1e.12, more than any model"),
    "no end of labels": ({"num_labels": 10**12}, "num_labels 1e.12, more than any model"),
    "another size": ({"intermediate_size": 65}, "has another shape than its configuration says"),
    "fewer labels": ({"id2label": {"0": "a"}, "label2id": {"a": 0}}, "another shape .* in the tensor classifier"),
    "odd labels": ({"id2label": {"a": "b"}}, "could not be loaded"),
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantised \(gptq\).*dequantize"),
    "awq": ({"quantization_config": {"quant_method": "awq", "bits": 4}}, r"quantised \(awq\).*dequantize"),
    "bitsandbytes": (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        r"quantised \(bitsandbytes\).*dequantize",
    ),
    "weights elsewhere": ({"transformers_weights": "../model.safetensors"}, "inside the model directory"),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_an_odd_configuration_is_one_sentence(expert: Path, name: str) -> None:
    changes, sentence = CONFIGURATIONS[name]
    edit(expert / "config.json", **changes)
    with pytest.raises(ExpertError, match=sentence) as told:
        load_expert("bad", expert)
    assert_one_sentence(told.value)
    assert str(expert) in str(told.value)


INDICES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no map": (lambda index: {"metadata": {}}, "has no weight_map"),
    "no mapping": (lambda index: [1], "has no weight_map"),
    "no files": (lambda index: {**index, "weight_map": dict.fromkeys(index["weight_map"], 5)}, "names the shard 5"),
    "up": (
        lambda index: {**index, "weight_map": {n: f"../file/{f}" for n, f in index["weight_map"].items()}},
        "which is no file in its folder",
    ),
    "absolute": (
        lambda index: {**index, "weight_map": dict.fromkeys(index["weight_map"], "/etc/passwd")},
        "which is no file in its folder",
    ),
}


@pytest.mark.parametrize("name", INDICES)
def test_an_odd_index_of_shards_is_one_sentence(saved: Path, tmp_path: Path, name: str) -> None:
    change, sentence = INDICES[name]
    folder = shutil.copytree(saved / "shards", tmp_path / "expert")
    load_expert("good", folder)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ExpertError, match=sentence) as told:
        load_expert("bad", folder)
    assert_one_sentence(told.value)


def test_a_pickle_is_not_read(expert: Path) -> None:
    torch.save(load_file(expert / "model.safetensors"), expert / "pytorch_model.bin")
    (expert / "model.safetensors").unlink()
    with pytest.raises(ExpertError, match="a pickle can run code"):
        load_expert("bad", expert)


def test_code_and_kernels_that_a_configuration_names_are_not_used(expert: Path, tmp_path: Path) -> None:
    (expert / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: ...\nclass Model: ...\n")
    mapping = {"AutoConfig": "evil.Config", "AutoModelForImageClassification": "evil.Model"}
    edit(expert / "config.json", auto_map=mapping, attn_implementation="kernels-community/flash-attn")
    assert load_expert("odd", expert).config._attn_implementation in ("sdpa", "eager")
    assert not (tmp_path / "ran").exists()


def sparse() -> nn.Module:
    model = tiny.build("vit")
    model.classifier.weight = nn.Parameter(model.classifier.weight.to_sparse())
    return model


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "on the meta device": (lambda: tiny.build("vit").to("meta"), r"has no values \(device meta\)"),
    "wrapped": (lambda: nn.DataParallel(tiny.build("vit")), "wrapped in DataParallel; .* model.module"),
    "compiled": (lambda: torch.compile(tiny.build("vit")), "wrapped in OptimizedModule; .* model._orig_mod"),
    "sparse": (sparse, "the tensor classifier.weight .* is sparse"),
    "quantised": (lambda: quantize_dynamic(tiny.build("vit"), {nn.Linear}), "the module vit.* is quantised"),
    "nothing": (lambda: None, "of type NoneType; give a loaded model, a repo id or a folder"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_expert_is_one_sentence(name: str) -> None:
    make, sentence = WRONG[name]
    with pytest.raises(ExpertError, match=sentence) as told:
        hf_zipit.plan({"good": tiny.build("vit"), "bad": make()})
    assert_one_sentence(told.value)
    assert "'bad'" in str(told.value)


@pytest.mark.parametrize("given", [None, "abc", 5, [5, 6]])
def test_what_are_no_experts_is_one_sentence(given: Any) -> None:
    with pytest.raises(ExpertError, match="give a (mapping|loaded model)") as told:
        hf_zipit.plan(given)
    assert_one_sentence(told.value)


@pytest.mark.parametrize("labels", [{0: "a"}, {0: "a", 5: "b", 6: "c"}])
def test_labels_that_are_not_the_heads_are_told_before_any_work(labels: dict[int, str]) -> None:
    models = dict(zip("ab", tiny.pair("vit"), strict=True))
    models["a"].config.id2label = labels
    with pytest.raises(ExpertError, match=r"the expert 'a' names the .* classes .*\(id2label\)") as told:
        hf_zipit.plan(models)
    assert_one_sentence(told.value)


# Links, and what travels ---------------------------------------------------------------------------------------------


ODD = "a | b `c` <script>alert(1)</script> ![x](http://y)"
SECRETS = {"token": "SECRET", "use_auth_token": "SECRET", "nested": {"api_key": "SECRET"}}


@pytest.fixture(scope="module")
def merged() -> PreTrainedModel:
    """Of experts with odd names and labels, whose configurations tell what one logs in with."""
    models = dict(zip((ODD, "```"), tiny.pair("vit"), strict=True))
    models[ODD].config.id2label = {0: "| x |", 1: "```\n# Title", 2: "<img src=x>"}
    for number, model in enumerate(models.values()):  # that they differ is no difference between models
        model.config.update({**SECRETS, "token": f"SECRET {number}"})
    return hf_zipit.merge(models, method="identity").eval()


@pytest.fixture(scope="module")
def written(merged: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    merged.save_pretrained(folder)
    return folder


@pytest.fixture
def result(written: Path, tmp_path: Path) -> Path:
    """A merged model in a folder with more in it."""
    shutil.copytree(written, tmp_path / "result")
    (tmp_path / "key").write_text("SECRET")
    for name in ("id_rsa", "trainer_state.json", "wandb/run.log", ".env", "processors/x.py"):
        (tmp_path / "result" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "result" / name).write_text("SECRET")
    return tmp_path / "result"


def test_what_logs_in_somewhere_is_not_saved(written: Path) -> None:
    assert not any(b"SECRET" in path.read_bytes() for path in written.iterdir())


@pytest.fixture
def pushed(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """What reaches the Hub."""
    found: dict[str, bytes] = {}

    def commit(_: str, changes: list[Any], **__: Any) -> SimpleNamespace:
        for change in changes:
            content = change.path_or_fileobj
            found[change.path_in_repo] = content if isinstance(content, bytes) else Path(content).read_bytes()
        return SimpleNamespace(oid="1")

    api = SimpleNamespace(
        create_repo=lambda repo_id, **_: SimpleNamespace(repo_id=repo_id),
        list_repo_files=lambda *_, **__: [], create_commit=commit,
    )  # fmt: skip
    monkeypatch.setattr(hub, "_api", lambda token: api)
    return found


def test_only_what_belongs_to_the_model_is_pushed(result: Path, pushed: dict[str, bytes]) -> None:
    push_saved(result, "me/x")
    assert {"config.json", "model.safetensors", "README.md", "modeling_hf_zipit.py"} <= pushed.keys()
    assert not any(b"SECRET" in content for content in pushed.values())


@pytest.mark.parametrize("name", ["vocab.txt", "README.md", "processors/a/tokenizer.json"])
def test_a_link_out_of_the_folder_is_not_pushed(result: Path, pushed: dict[str, bytes], name: str) -> None:
    (result / name).parent.mkdir(parents=True, exist_ok=True)
    (result / name).unlink(missing_ok=True)
    (result / name).symlink_to(result.parent / "key")
    with pytest.raises(OutputError, match="a link that leads out of the folder"):
        push_saved(result, "me/x")
    assert not pushed


def test_a_link_out_of_an_experts_folder_is_not_copied(expert: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("SECRET")
    (expert / "vocab.txt").symlink_to(tmp_path / "key")
    with pytest.raises(ExpertError, match="a link that leads out of its folder"):
        hf_zipit.merge({"a": expert, "b": tiny.build("vit", 1)}, method="identity")


def test_a_card_behind_a_link_is_not_read(expert: Path, tmp_path: Path) -> None:
    (tmp_path / "card.md").write_text("---\nlicense: mit\n---\n")
    (expert / "README.md").symlink_to(tmp_path / "card.md")
    assert card_data(str(expert)) == {}


# Cards ---------------------------------------------------------------------------------------------------------------

METADATA = {
    "a date that is none": "license: 2020-13-45",
    "a number": "license: mit\ndatasets: 5",
    "deep": "datasets: " + "[" * 700,
    "many digits": "license: " + "9" * 5000,
    "not a mapping": "- 1\n- 2",
    "a tag": "license: !!python/object/apply:os.system [true]",
    "no text": "license: [mit, [x]]\ndatasets: {a: b}",
    "not YAML": "a: b: c",
}


@pytest.mark.parametrize("name", METADATA)
def test_odd_metadata_of_an_experts_card_is_left_out(expert: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (expert / "README.md").write_text(f"---\n{METADATA[name]}\n---\n# An expert\n")
    warned: list[str] = []
    monkeypatch.setattr("hf_zipit.experts.origins.logger.warning", lambda text, *given: warned.append(text % given))
    found = origin(load_expert("a", expert), "0")
    assert found.datasets == () and found.licence == ({"license": "mit"} if name == "a number" else {})
    assert name == "not a mapping" or (warned and "left out" in warned[0] and "\n" not in warned[0])


def test_names_cannot_change_the_card(written: Path) -> None:
    _, _, text = (written / "README.md").read_text().split("---\n", 2)
    outside = "".join(part for i, part in enumerate(text.split("\n```")) if i % 2 == 0)  # of fenced code
    assert "<script>" not in outside and "<img" not in outside and "\n# Title" not in text
    widths = {}
    for line in outside.splitlines():
        if line.startswith("|"):
            cells = line.replace("\\|", "").count("|")
            widths.setdefault(cells, []).append(line)
    assert all(len(lines) > 2 for lines in widths.values()), widths


# What no joint answer is ---------------------------------------------------------------------------------------------


def detection() -> tuple[type[PreTrainedModel], Any, dict[str, torch.Tensor]]:
    config = transformers.YolosConfig(**{**tiny.IMAGE, "image_size": [16, 16]}, num_detection_tokens=4)
    return transformers.YolosForObjectDetection, config, {"pixel_values": torch.randn(2, 3, 16, 16)}


def test_where_there_is_no_joint_answer_a_task_has_to_be_named() -> None:
    model_class, config, inputs = detection()
    models = {task: model_class(config).eval() for task in "ab"}
    merged = hf_zipit.merge(models, method="identity", depth=0)
    with pytest.raises(ZipItError, match="has no joint .* name the one you mean, task='a'") as told:
        merged(**inputs)
    assert_one_sentence(told.value)
    merged(**inputs, task="b")


def test_labels_without_a_task_warn(merged: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(modeling.base.logger, "warning_once", told.append)
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 1])}
    merged(**inputs, task=ODD)
    assert not told
    merged(**inputs)
    assert "ids of the joint classes" in told[0]


# The boundary --------------------------------------------------------------------------------------------------------


def test_a_loading_script_is_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "pictures.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(DataError, match="pictures.* cannot be loaded") as told:
        load_source(str(folder))
    assert_one_sentence(told.value)
    assert told.value.__cause__ is not None and not (tmp_path / "ran").exists()


def test_memory_that_runs_out_is_one_sentence() -> None:
    def small() -> str:
        """With address space for what is there and little more."""
        import resource

        models = {task: tiny.build("vit", seed, intermediate_size=200_000) for seed, task in enumerate("ab")}
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**24, used + 2**24))
        with pytest.raises(OutOfMemoryError) as told:
            hf_zipit.merge(models, method="identity")
        assert told.value.__cause__ is not None
        return str(told.value)

    if not Path("/proc/self/statm").exists():
        pytest.skip("this system does not tell the address space")
    assert "it ran out of memory; merge fewer" in told_by(small)
