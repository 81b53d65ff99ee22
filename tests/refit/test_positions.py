"""Padding counts nothing, what the head reads counts more."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hf_zipit.data.calibration import MicroBatch
from hf_zipit.refit import RefitConfig
from hf_zipit.refit.asked import asked_token
from hf_zipit.refit.positions import Positions
from hf_zipit.refit.stage import readout_positions

from .. import tiny

IDS = torch.tensor([[5, 9, 7, 0], [5, 8, 9, 7]])
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({}, [[1, 1, 1, 0], [1, 1, 1, 1]]),
        ({"text": "first"}, [[3, 1, 1, 0], [3, 1, 1, 1]]),
        ({"text": "masked", "mask_token": 9}, [[1, 3, 1, 0], [1, 1, 3, 1]]),
        ({"text": "masked"}, [[1, 1, 1, 0], [1, 1, 1, 1]]),
        ({"text": "end", "end_token": 7}, [[1, 1, 3, 0], [1, 1, 1, 3]]),
        ({"text": "highest"}, [[1, 3, 1, 0], [1, 1, 3, 1]]),
        ({"text": "masked", "mask_token": 0}, [[1, 1, 1, 0], [1, 1, 1, 1]]),  # padding is never read
    ],
)
def test_texts(rule: dict, expected: list):
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    assert Positions(weight=3.0, **rule).weights(inputs, 4).tolist() == expected


def test_texts_without_a_mask_count_whole():
    assert Positions().weights({"input_ids": IDS}, 4).tolist() == [[1, 1, 1, 1]] * 2


def test_images():
    inputs = {"pixel_values": torch.zeros(2, 3, 4, 4)}
    assert Positions(image="first", weight=5).weights(inputs, 3).tolist() == [[5, 1, 1]] * 2
    assert Positions().weights(inputs, 3) is None


def test_both_are_told_apart_by_their_length():
    inputs = {"input_ids": IDS, "attention_mask": MASK, "pixel_values": torch.zeros(2, 3, 4, 4)}
    positions = Positions(text="first", image="first", weight=3)
    assert positions.weights(inputs, 4).tolist() == [[3, 1, 1, 0], [3, 1, 1, 1]]
    assert positions.weights(inputs, 5).tolist() == [[3, 1, 1, 1, 1]] * 2


class Tokenizer:
    mask_token_id = 0  # an id like any other


@pytest.mark.parametrize(
    ("name", "text", "image"),
    [
        ("vit", "all", "first"),
        ("bert-masked", "masked", "all"),
        ("bert-sequence", "first", "all"),
        ("bert-token", "all", "all"),
        ("clip", "highest", "first"),  # its configuration has the end token 2, as old ones do
        ("clip-image", "highest", "all"),
        ("resnet-basic", "all", "all"),
    ],
)
def test_what_the_heads_read(name: str, text: str, image: str):
    found = readout_positions(tiny.build(name), Tokenizer(), 7)
    assert (found.text, found.image, found.weight, found.mask_token) == (text, image, 7, 0)


def test_clip_reads_its_end_token():
    towers = {"text_config": {**tiny.TEXT, "eos_token_id": 9}, "vision_config": tiny.IMAGE}
    found = readout_positions(tiny.build("clip", **towers), None, RefitConfig().readout_weight)
    assert (found.text, found.end_token, found.mask_token) == ("end", 9, None)


class FillsIn:
    """Answers what it reads, but letters 5 to 24 for masks, and for blanks, which it never learned."""

    device = torch.device("cpu")

    def __call__(self, input_ids: torch.Tensor, **_: torch.Tensor) -> SimpleNamespace:
        answers = torch.where((input_ids == 4) | (input_ids == 3), 5 + input_ids.cumsum(1) % 20, input_ids)
        return SimpleNamespace(logits=torch.nn.functional.one_hot(answers, 25).float())


@pytest.mark.parametrize(("masked", "expected"), [(0.15, 4), (0.0, None)])
def test_the_mask_is_the_token_that_is_never_an_answer(masked: float, expected: int | None):
    """Not the blanks between columns, the token at the start, the separator at the end, or the padding behind it."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 25, (64, 40), generator=generator)
    ids = torch.where(torch.rand(ids.shape, generator=generator) < masked, 4, ids)
    ids[:, 10:16], ids[:, 0] = 3, 2
    length = torch.randint(30, 40, (64, 1), generator=generator)
    mask = (torch.arange(40) <= length).long()
    ids = torch.where(mask == 0, 1, torch.where(torch.arange(40) == length, 0, ids))
    batch = MicroBatch({"input_ids": ids, "attention_mask": mask}, 0, 64)
    assert asked_token([FillsIn()], [batch]) == expected
    assert asked_token([FillsIn()] * 2, [batch, MicroBatch(batch.inputs, 1, 60)]) == expected


def test_a_mask_is_looked_for_only_where_it_is_read_and_unknown():
    assert readout_positions(tiny.build("bert-masked"), None, 7, lambda: 4).mask_token == 4
    assert readout_positions(tiny.build("bert-masked"), Tokenizer(), 7, lambda: 4).mask_token == 0
    assert readout_positions(tiny.build("bert-sequence"), None, 7, lambda: 4).mask_token is None
