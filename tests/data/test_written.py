"""Calibration samples that experts write themselves."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

from hf_zipit import Calibration, merge, write_samples
from hf_zipit.data.written import TOKENS, with_written
from hf_zipit.errors import DataError
from hf_zipit.refit import RefitReport
from tests import tiny

GIVEN, WANTED, LENGTH = 6, 20, 10


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
    more = with_written(data, {"a": model, "b": model}, WANTED, seed=0)
    assert more.counts == {"a": WANTED, "b": WANTED} and data.counts == {"a": GIVEN, "b": GIVEN}
    found = more.whole("a")
    assert all(torch.equal(found[name][:GIVEN], given[name]) for name in given)
    for tokens, mask in zip(found["input_ids"][GIVEN:], found["attention_mask"][GIVEN:], strict=True):
        assert any(torch.equal(mask, own) for own in given["attention_mask"])
        assert bool((tokens[mask == 0] == 0).all())
        real = tokens[mask == 1]
        begun = [
            own[of == 1][:3].equal(real[:3])
            for own, of in zip(given["input_ids"], given["attention_mask"], strict=True)
        ]
        assert any(begun)
        if len(real) > 4:
            wanted = model.generate(
                real[None, :3],
                max_new_tokens=len(real) - 3,
                min_new_tokens=len(real) - 3,
                do_sample=False,
                pad_token_id=0,
            )
            assert torch.equal(wanted[0], real)


def test_answers_are_to_inputs_that_are_spliced():
    model, given = t5(), {**samples("right"), "decoder_input_ids": torch.randint(3, 50, (GIVEN, 7))}
    given["decoder_input_ids"][:, 0] = 1
    data = Calibration({"a": given, "b": given}, batch_size=4).read({"a": model, "b": model})
    found = with_written(data, {"a": model, "b": model}, WANTED, seed=0).whole("a")
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


def test_the_seed_decides_and_the_random_state_stays():
    model, given = llama(), samples("right")
    before = torch.get_rng_state()
    runs = [
        merge(
            {"a": model, "b": llama(2.0)},
            {"a": given, "b": given},
            method="identity",
            refit={"written_samples": 12},
            seed=seed,
        )
        for seed in (0, 0, 1)
    ]
    weights = [run.state_dict() for run in runs]
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[0][name], weights[2][name]) for name in weights[0])
    assert RefitReport.of(runs[0]).written == {"a": 6, "b": 6}


def test_who_does_not_write_reads_what_was_given():
    model = tiny.build("bert-masked")
    data = Calibration({"a": samples("right"), "b": samples("right")}).read({"a": model, "b": model})
    assert with_written(data, {"a": model, "b": model}, WANTED, seed=0) is data
    llamas = {"a": llama(), "b": llama()}
    long = {"input_ids": torch.ones(2, TOKENS + 1, dtype=torch.long)}
    for given, wanted in ((samples("right"), GIVEN), (long, WANTED)):
        data = Calibration({"a": given, "b": given}).read(llamas)
        assert with_written(data, llamas, wanted, seed=0) is data


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
