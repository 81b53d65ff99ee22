"""One Hub on localhost, a process that knows no other, and a merged model: each made once for all tests here."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

import hf_zipit

from .server import Hub, running_hub

LABELS = {"clothes": ["shirt", "coat", "bag"], "shoes": ["boot", "sandal"]}
CARD = "---\nlicense: apache-2.0\ndatasets:\n- me/pictures\n---\n\n# An expert\n"
SIZES = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip


def expert(seed: int, labels: list[str], folder: Path) -> Path:
    """A small ViT that is saved with its image processor and a card."""
    names = dict(enumerate(labels))
    torch.manual_seed(seed)
    model = ViTForImageClassification(ViTConfig(**SIZES, id2label=names, label2id={n: i for i, n in names.items()}))
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    return folder


def images(count: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two saved experts of different initialisation."""
    room = tmp_path_factory.mktemp("experts")
    return {task: expert(seed, labels, room / task) for seed, (task, labels) in enumerate(LABELS.items())}


@pytest.fixture(scope="session")
def merged_folder(experts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The experts, merged at full depth and saved."""
    merged = hf_zipit.merge(experts, images(), method="permute")
    folder = tmp_path_factory.mktemp("merged") / "both"
    merged.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def _hub() -> Iterator[Hub]:
    with running_hub() as found:
        yield found


Client = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def _client(_hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Client, Path]]:
    home = tmp_path_factory.mktemp("home")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.hub.worker"],
        env=_hub.environment(home), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=home,
    )  # fmt: skip

    def call(code: str, **arguments: Any) -> dict[str, Any]:
        process.stdin.write(json.dumps({"code": code, "arguments": arguments}, default=str) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        assert answer, "the process ended; its traceback is above"
        found = json.loads(answer)
        assert "traceback" not in found, found["traceback"]
        return found

    yield call, home
    process.stdin.close()
    process.wait(10)


@pytest.fixture
def hub(_hub: Hub, _client: tuple[Client, Path]) -> Hub:
    """The Hub without repos, and nothing of it in the client's cache."""
    _hub.repos, _hub.lfs, _hub.calls, _hub.fail = {}, {}, [], set()
    shutil.rmtree(_client[1] / "hub", ignore_errors=True)
    return _hub


@pytest.fixture
def client(hub: Hub, _client: tuple[Client, Path]) -> Client:
    """Runs code in the process that knows this Hub: `{"result": ...}`, or `{"error": ..., "kind": ...}`."""
    return _client[0]


def fresh(hub: Hub, home: Path, code: str, *arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new process that knows only this Hub and has nothing in its cache."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=hub.environment(home, **more), cwd=home, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
