"""What a new user tries first, and what went wrong once."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers
from datasets import Dataset, Features, Value
from transformers import ResNetConfig, ResNetForImageClassification

import hf_zipit

from .conftest import save_vit


def error(answer: tuple[int, str, str]) -> str:
    """The one sentence of an answer that must be an error."""
    code, out, err = answer
    assert code == 1 and out == "" and "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("Error: ")]
    return line


def images(folder, count: int = 40, size: int = 8, **columns) -> str:
    """A saved data set of noise without labels, or with the columns that are given."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(count, 1, size, size, generator=generator).numpy()
    data = Dataset.from_dict({"pixel_values": list(pixels), **columns})
    data.save_to_disk(str(folder))
    return str(folder)


def test_data_without_labels_is_calibration_data_for_all_tasks(call, vits, tmp_path):
    data = images(tmp_path / "data")
    out = tmp_path / "m"
    code, printed, err = call("merge", vits / "low", vits / "high", "-c", data, "--samples", 8, "-o", out)
    assert code == 0
    assert "does not tell which samples are of low or high: all are taken" in err
    kept = re.search(r"kept +answers as its experts do on [\d.]+ % of (\d+) samples \(low .+, high ", printed)
    assert kept and int(kept[1]) == 2 * (40 - 16)  # each expert on what the merge has not read
    assert "calibration" in (out / "recipe.yaml").read_text()
    assert "samples it answers as the task's expert does in" in (out / "README.md").read_text()


def test_classes_are_matched_by_an_option_where_labels_have_no_names(call, tmp_path, vits):
    for seed, name in enumerate(("a", "b")):
        save_vit(tmp_path / name, seed, ["LABEL_0", "LABEL_1"])
    two = (tmp_path / "a", tmp_path / "b", "-c", "sklearn-digits", "--samples", 8)
    code, _, err = call("merge", *two, "-o", tmp_path / "all")
    assert code == 0 and "does not tell which samples" in err
    code, _, err = call("merge", *two, "-o", tmp_path / "m", "--classes", "a=0,1", "--classes", "b=seven,8")
    assert code == 1 and "asks for the class 'seven'" in err
    named = ("--classes", "a=0,1", "--classes", "b=7,8")
    code, printed, err = call("merge", *two, "-o", tmp_path / "m", *named, "--json")
    assert code == 0 and "does not tell" not in err
    assert json.loads(printed)["recipe"]["experts"]["b"]["classes"] == [7, 8]
    evaluating = ("evaluate", tmp_path / "m", "--dataset", "sklearn-digits", "--samples", 10)
    assert "--classes a=A,B,..." in error(call(*evaluating))
    code, printed, _ = call(*evaluating, *named, "--json")
    assert code == 0 and json.loads(printed)["samples"] == {"a": 10, "b": 10}
    assert "names the task 'c'" in error(call("merge", *two, "-o", tmp_path / "n", "--classes", "c=1"))
    assert "should be TASK=A,B,C" in error(call("merge", *two, "-o", tmp_path / "n", "--classes", "c"))


def test_a_bare_name_may_be_a_data_set_of_the_hub(call, vits, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    told = error(call("merge", vits / "low", vits / "high", "-c", "imdb", "-o", tmp_path / "m"))
    assert "The data set 'imdb' (split 'train') cannot be loaded: HF_HUB_OFFLINE is set" in told


def test_a_file_is_data_and_its_only_text_column_is_found(call, tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    from ..processors import WORDS, tokenizer

    for seed, name in enumerate(("mood", "topic")):
        torch.manual_seed(seed)
        size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        config = BertConfig(**size, vocab_size=len(WORDS), max_position_embeddings=32)
        BertForSequenceClassification(config).save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "reviews.csv").write_text("stars,review\n" + "3,the red boot\n4,a blue cap\n" * 20)
    two = ("merge", tmp_path / "mood", tmp_path / "topic", "--samples", 8, "-o", tmp_path / "m")
    code, _, err = call(*two, "-c", tmp_path / "reviews.csv")
    assert code == 0 and "the column 'review' is read as text" in err
    (tmp_path / "reviews.doc").write_text("the red boot")
    assert "should be one of .csv" in error(call(*two, "-c", tmp_path / "reviews.doc"))


def test_two_architectures_are_told_before_their_labels(call, vits, tmp_path):
    config = ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    ResNetForImageClassification(config).save_pretrained(tmp_path / "resnet")
    told = error(call("merge", vits / "low", tmp_path / "resnet", "-c", "sklearn-digits", "-o", tmp_path / "m"))
    assert "'resnet' is a ResNetForImageClassification, but 'low' is a ViTForImageClassification" in told


@pytest.fixture(scope="module")
def merged(vits, tmp_path_factory):
    """A merged model in a folder."""
    folder = tmp_path_factory.mktemp("merged") / "digits"
    hf_zipit.merge([vits / "low", vits / "high"], method="weights").save_pretrained(folder)
    return folder


def test_data_that_a_model_cannot_read_is_one_sentence(call, vits, merged, tmp_path):
    labels = {"label": [str(i % 10) for i in range(40)]}
    large = images(tmp_path / "large", size=16, **labels)
    told = error(call("evaluate", merged, "--dataset", large, "--split", "train"))
    assert "ViTForImageClassification cannot run on the evaluation data of the task 'low'" in told
    told = error(call("merge", vits / "low", vits / "high", "-c", large, "-o", tmp_path / "m"))
    assert "The expert 'low' cannot run on" in told
    features = Features({"pixel_values": Value("float32"), "label": Value("int64")})
    Dataset.from_dict({"pixel_values": [], "label": []}, features=features).save_to_disk(str(tmp_path / "empty"))
    assert "is empty" in error(call("evaluate", merged, "--dataset", tmp_path / "empty"))
    other = images(tmp_path / "other", label=["x"] * 40)
    assert "has the label '0', which is not a class" in error(call("evaluate", merged, "--dataset", other))
    odd = images(tmp_path / "odd", label=[str(i % 2) for i in range(40)])
    assert "'7', which is not a class of the data set (0, 1)" in error(call("evaluate", merged, "--dataset", odd))


def test_inspect_shows_what_a_merged_model_is(call, merged):
    code, out, _ = call("inspect", merged)
    assert code == 0
    assert all(word in out for word in ("shared by all", "low", "7, 8, 9", "Merged by weights.", "100% of the blocks"))
    code, out, _ = call("inspect", merged, "--json")
    found = json.loads(out)
    assert found["parameters"] == found["trunk"] + sum(task["parameters"] for task in found["tasks"].values())
    code, out, _ = call("inspect", merged, "--task", "high", "--json")
    assert code == 0 and json.loads(out)["proof"]["holds"]
    assert "is unknown" in error(call("inspect", merged, "--task", "shoes"))


def test_only_merged_models_have_tasks_to_inspect(call, vits):
    assert "is not a merged model" in error(call("inspect", vits / "low", "--task", "low"))


@pytest.mark.parametrize("method", ["weights", "circuits", "average", "auto"])
def test_methods_that_need_no_data_take_none(call, vits, tmp_path, method):
    code, out, _ = call("merge", vits / "low", vits / "high", "-m", method, "-o", tmp_path / "m", "--json")
    assert code == 0 and json.loads(out)["kept"]["accuracy"] is None


def test_a_device_is_named_and_one_that_is_not_here_is_told(call, vits, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")  # put back when the test is over
    two = ("merge", vits / "low", vits / "high", "-m", "weights", "-o", tmp_path / "m", "--device")
    assert call(*two, "cpu")[0] == 0
    assert "The device 'abacus' cannot be used here" in error(call(*two, "abacus"))


@pytest.fixture
def recipe(vits, tmp_path):
    """Writes a recipe of the two experts; its path."""

    def write(**more) -> str:
        experts = {name: {"model": str(vits / name)} for name in ("low", "high")}
        data = {"dataset": "sklearn-digits", "samples": 16}
        content = {"name": "digits", "experts": experts, "calibration": data, "output": str(tmp_path / "out"), **more}
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps(content))
        return str(path)

    return write


def test_a_picture_is_of_the_kind_that_its_name_says(call, recipe, tmp_path):
    path = recipe(method="average", evaluation={"dataset": "sklearn-digits", "samples": 4})
    assert "should end in .png, .svg, .pdf" in error(call("sweep", path, "--plot", tmp_path / "x.doc"))
    assert call("sweep", path, "-d", "1", "-d", "0", "--plot", tmp_path / "x.svg")[0] == 0
    assert "<svg" in (tmp_path / "x.svg").read_text()


def test_one_merge_alone_is_not_the_best(call, recipe):
    code, out, _ = call("search", recipe(method="average", residual="match"))
    assert code == 0
    assert "only" in out and "best " not in out.split("written")[0]
    assert "nothing was chosen" in out and "±" in out
    code, out, _ = call("search", recipe(method=["average", "permute"], residual="match"))
    assert "best " in out and "only" not in out and "merges nearer than that are level" in out


def test_the_table_marks_the_best_merge_and_says_what_was_kept(call, recipe):
    data = {"dataset": "sklearn-digits", "samples": 40}
    path = recipe(method=["average", "auto"], depth=[1.0, 0.0], save={"method": "auto", "depth": 1.0}, evaluation=data)
    code, out, _ = call("run", path)
    assert code == 0
    lines = out.splitlines()
    (head,) = [line for line in lines if "of experts" in line]
    (best,) = [line for line in lines if line.strip().startswith("best ")]
    assert re.search(r"\d %", best) and " 1.00 " in best
    (kept,) = [line for line in lines if line.startswith("kept ")]
    told = r"kept +[\d.]+ % of the experts' mean accuracy \(low \S+, high \S+\); difference \S+, 95 % \S+ to \S+"
    assert re.fullmatch(told, kept)
    assert head.index("joint") < head.index("of experts")


def test_two_merges_are_compared_on_the_same_samples(call, vits, merged, tmp_path):
    call("merge", vits / "low", vits / "high", "-m", "average", "-o", tmp_path / "other")
    comparing = ("compare", merged, tmp_path / "other", "--dataset", "sklearn-digits", "--samples", 40)
    code, out, _ = call(*comparing, "--json")
    found = json.loads(out)
    assert code == 0 and set(found["models"]) == {str(merged), str(tmp_path / "other")}
    one, other = (found["models"][str(path)]["per_task"] for path in (merged, tmp_path / "other"))
    for task, difference in found["comparison"]["difference"].items():
        assert difference["value"] == pytest.approx(one[task] - other[task])
        assert difference["low"] <= difference["value"] <= difference["high"]
    code, out, _ = call(*comparing)
    assert code == 0 and all(words in out for words in ("A less B", "same answer", "95 % interval", "calibration"))
    code, out, _ = call("compare", merged, merged, "--dataset", "sklearn-digits", "--samples", 40, "--json")
    assert json.loads(out)["comparison"]["mean"] == {"value": 0, "low": 0, "high": 0}
    loaded = transformers.AutoModelForImageClassification.from_pretrained(merged)
    renamed = {task.upper(): loaded.expert(task) for task in loaded.config.tasks}
    hf_zipit.merge(renamed, method="weights").save_pretrained(tmp_path / "upper")
    told = error(call("compare", merged, tmp_path / "upper", "--dataset", "sklearn-digits"))
    assert "no task in common" in told


SLOW = """
import sys, time
{before}
from hf_zipit import cli
from hf_zipit.cli import commands, stopping
stopping.GRACE = 0.2
def start():
    open(sys.argv[1] + "/left", "w").close() if len(sys.argv) > 2 else None
    import tempfile
    tempfile.NamedTemporaryFile(delete=False)
    print("working", flush=True)
    {work}
commands.start = start
cli.main()
"""


@pytest.mark.parametrize(
    "work",
    [
        "time.sleep(30)",  # Python's own
        "import ctypes; ctypes.CDLL(None).sleep(30)",  # native code, to which Python tells nothing
    ],
)
def test_ctrl_c_stops_at_once_with_130_and_leaves_nothing(tmp_path, work):
    code = SLOW.format(before="", work=work)
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job's children ignore it
    )  # fmt: skip
    assert process.stdout.readline() == b"working\n"
    assert len(list(tmp_path.iterdir())) == 1
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and err == b"Stopped.\n"
    assert time.monotonic() - started < 15  # and not 30
    assert list(tmp_path.iterdir()) == []
