"""Calibration samples beside those that are given: what experts write themselves, and what is spliced."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

from hf_zipit import Calibration, merge, write_samples
from hf_zipit.data import written as limits
from hf_zipit.data.spliced import spliced
from hf_zipit.data.written import further_count, with_more
from hf_zipit.errors import DataError
from hf_zipit.refit import RefitReport
from tests import tiny

GIVEN, WANTED, LENGTH = 6, 25, 10


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(limits, "TOKENS", WANTED * LENGTH)


def llama(scale: float = 1.0) -> PreTrainedModel:
    model = tiny.build("llama", max_position_embeddings=32)
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    return model


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2))


def samples(side: str) -> dict[str, torch.Tensor]:
    """Tokens of different lengths, filled up with 0 on one side."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 50, (GIVEN, LENGTH), generator=generator)
    mask = (torch.arange(LENGTH) < torch.tensor([10, 7, 4, 9, 5, 10])[:, None]).long()
    mask = mask.flip(1) if side == "left" else mask
    return {"input_ids": tokens * mask, "attention_mask": mask}


@pytest.mark.parametrize("side", ["left", "right"])
def test_causal_models_go_on_from_how_samples_begin(side: str):
    model, given = llama(scale=1e6), samples(side)  # which leaves nothing to chance
    data = Calibration({"a": given, "b": given}, batch_size=4).read({"a": model, "b": model})
    more, written, of_given = with_more(data, {"a": model, "b": model}, WANTED, seed=0)
    assert more.counts == {"a": WANTED, "b": WANTED} and data.counts == {"a": GIVEN, "b": GIVEN}
    assert (written, of_given) == ({"a": WANTED - GIVEN, "b": WANTED - GIVEN}, {})
    found = more.whole("a")
    assert all(torch.equal(found[name][:GIVEN], given[name]) for name in given)
    for tokens, mask in zip(found["input_ids"][GIVEN:], found["attention_mask"][GIVEN:], strict=True):
        assert any(torch.equal(mask, own) for own in given["attention_mask"])
        assert bool((tokens[mask == 0] == 0).all())
        real = tokens[mask == 1]
        assert any(own[of == 1][0] == real[0] for own, of in zip(*(given[name] for name in given), strict=True))
        rest = len(real) - 1
        wanted = model.generate(
            real[None, :1], max_new_tokens=rest, min_new_tokens=rest, do_sample=False, pad_token_id=0
        )
        assert torch.equal(wanted[0], real)


def test_answers_are_to_inputs_that_are_spliced():
    model, given = t5(), {**samples("right"), "decoder_input_ids": torch.randint(3, 50, (GIVEN, 7))}
    given["decoder_input_ids"][:, 0] = 1
    data = Calibration({"a": given, "b": given}, batch_size=4).read({"a": model, "b": model})
    more, written, of_given = with_more(data, {"a": model, "b": model}, WANTED, seed=0)
    assert written["a"] == WANTED * LENGTH // (LENGTH + 7) and written["a"] + of_given["a"] == WANTED - GIVEN
    found = more.whole("a")
    ends = {
        tuple(row[mask == 1][-1:].tolist())
        for row, mask in zip(given["input_ids"], given["attention_mask"], strict=True)
    }
    for tokens, mask, answer in zip(*(found[name][GIVEN:] for name in given), strict=True):
        real = tokens[mask == 1]
        assert bool((tokens[mask == 0] == 0).all()) and 1 <= len(real) <= LENGTH
        assert real[0] in given["input_ids"] and (len(real) == LENGTH or tuple(real[-1:].tolist()) in ends)
        assert answer[0] == 1
    assert len(found["decoder_input_ids"]) == WANTED and found["decoder_input_ids"].shape[1] == 7


def test_the_seed_decides_and_the_random_state_stays(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(limits, "TOKENS", 15 * LENGTH)
    model, given = llama(), samples("right")
    before = torch.get_rng_state()
    runs = [
        merge(
            {"a": model, "b": llama(2.0)},
            {"a": given, "b": given},
            method="identity",
            refit={"written_samples": WANTED},
            seed=seed,
        )
        for seed in (0, 0, 1)
    ]
    weights = [run.state_dict() for run in runs]
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[0][name], weights[2][name]) for name in weights[0])
    report = RefitReport.of(runs[0])
    assert (report.written, report.spliced) == ({"a": 15, "b": 15}, {"a": 4, "b": 4})


@pytest.mark.parametrize("side", ["left", "right"])
def test_splices_begin_like_one_sample_and_go_on_like_another(side: str):
    model, given = tiny.build("bert-masked"), samples(side)
    given["input_ids"] = (torch.arange(GIVEN * LENGTH).view(GIVEN, LENGTH) + 1) * given["attention_mask"]  # all differ
    given["token_type_ids"] = 2 * given["input_ids"]
    data = Calibration({"a": given, "b": given}, batch_size=4).read({"a": model, "b": model})
    more, written, of_given = with_more(data, {"a": model, "b": model}, WANTED, seed=0)
    assert (written, of_given) == ({}, {"a": WANTED - GIVEN, "b": WANTED - GIVEN})
    found = more.whole("a")
    assert len(found["input_ids"]) == WANTED and torch.equal(found["token_type_ids"], 2 * found["input_ids"])
    assert torch.equal(found["attention_mask"], (found["input_ids"] > 0).long())
    rows = [row[row > 0].tolist() for row in given["input_ids"]]
    seams = 0
    for tokens, mask in zip(found["input_ids"][GIVEN:], found["attention_mask"][GIVEN:], strict=True):
        steps = mask.diff()
        assert bool((steps >= 0 if side == "left" else steps <= 0).all())
        real = tokens[mask > 0].tolist()
        firsts = [real[:cut] for cut in range(len(real) + 1) if any(real[:cut] == row[:cut] for row in rows)]
        assert any(
            not rest or any(rest == row[-len(rest) :] for row in rows) for rest in (real[len(f) :] for f in firsts)
        )
        seams += real not in rows
    assert seams > 5


@pytest.mark.parametrize("masked", [False, True])
def test_sounds_are_spliced_along_time_and_decoders_follow(masked: bool):
    time, given = torch.arange(12.0), torch.arange(3.0)[:, None]
    sounds = {
        "input_features": (given * 100 + time)[:, None].expand(3, 4, 12),  # time last
        "attention_mask": torch.ones(3, 12, dtype=torch.long),
        "decoder_input_ids": (given * 100 + torch.arange(6)).long(),
    }
    if not masked:
        del sounds["attention_mask"]
    draw = torch.Generator().manual_seed(0)
    found = [make() for make in spliced(sounds, "input_features", 5, draw, 2)]
    assert [len(part["input_features"]) for part in found] == [2, 2, 1]
    for part in found:
        heard, said = part["input_features"], part["decoder_input_ids"]
        assert bool((heard == heard[:, :1]).all()) and torch.equal(heard[:, 0] % 100, time.expand(len(heard), -1))
        assert torch.equal(said % 100, torch.arange(6).expand(len(said), -1))
        assert torch.equal(heard[:, 0, [0, -1]] // 100, said[:, [0, -1]] // 100)  # the same two


def test_how_many_there_are():
    bert, image, causal = (tiny.build(name) for name in ("bert-masked", "vit", "llama"))
    given, tokens = samples("right"), WANTED * LENGTH

    def total(expert: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> int:
        return GIVEN + further_count(expert, inputs, GIVEN, WANTED)

    for expert in (bert, causal):
        assert further_count(expert, given, WANTED, WANTED) == 0
        for length, wanted in ((LENGTH, WANTED), (5, 2 * WANTED), (2, 4 * WANTED), (tokens, GIVEN), (tokens // 2, 8)):
            assert total(expert, {"input_ids": torch.ones(GIVEN, length, dtype=torch.long)}) == wanted
    for length, wanted in ((LENGTH, WANTED), (limits.NUMBERS // 8, 8)):
        sounds = {"input_values": torch.zeros(GIVEN, length, device="meta")}
        assert total(tiny.build("wav2vec2"), sounds) == wanted
    for expert, inputs in (
        (image, {"pixel_values": torch.zeros(GIVEN, 3, 8, 9)}),  # positions along two axes
        (bert, {**given, "pixel_values": torch.zeros(GIVEN, 3, 8, 8)}),  # texts with images
        (bert, {**given, "image_grid_thw": torch.ones(GIVEN, 3)}),
        (bert, {**given, "length": torch.ones(GIVEN)}),
    ):
        assert total(expert, inputs) == GIVEN
    together = Calibration(given).read({"a": bert, "b": bert})
    assert with_more(together, {"a": bert, "b": bert}, WANTED, seed=0) == (together, {}, {})


def test_where_an_expert_cannot_write_samples_are_spliced(monkeypatch: pytest.MonkeyPatch):
    model, given = llama(), samples("right")
    monkeypatch.setattr(model, "generate", None)
    data = Calibration({"a": given, "b": given}).read({"a": model, "b": model})
    assert with_more(data, {"a": model, "b": model}, WANTED, seed=0)[1:] == ({}, dict.fromkeys("ab", WANTED - GIVEN))


def test_causal_models_need_no_data():
    models = {"a": llama(), "b": llama(2.0)}
    assert write_samples(models, samples=2, length=100)["a"]["input_ids"].shape == (2, 32)  # its positions
    data = write_samples(models, samples=WANTED, length=LENGTH)
    assert all(data[task]["input_ids"].shape == (WANTED, LENGTH) for task in models)
    assert len(data["a"]["input_ids"][:, 0].unique()) > 1
    assert RefitReport.of(merge(models, data, refit={"written_samples": 0})).written == {}
    with pytest.raises(DataError, match="writes nothing by itself"):
        write_samples({"a": t5()})
    with pytest.raises(DataError, match="nothing can be written"):
        write_samples(models, length=1)
