"""The console script as a function, and small saved models to call it with."""

from __future__ import annotations

import sys

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from hf_zipit.cli import main


def save_vit(folder, seed: int, labels: list[str], **settings) -> None:
    """A ViT of 8 x 8 pixels."""
    named = dict(enumerate(labels))
    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, id2label=named, label2id={label: i for i, label in named.items()}, **settings,
    )  # fmt: skip
    torch.manual_seed(seed)
    ViTForImageClassification(config).save_pretrained(folder)


@pytest.fixture(scope="package")
def vits(tmp_path_factory):
    """Two saved ViTs of different initialisation, for digits."""
    folder = tmp_path_factory.mktemp("vits")
    for seed, (name, digits) in enumerate({"low": "01", "high": "789"}.items()):
        save_vit(folder / name, seed, list(digits))
    return folder


@pytest.fixture
def call(monkeypatch, capsys):
    """Run the console script: exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hf-zipit", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
