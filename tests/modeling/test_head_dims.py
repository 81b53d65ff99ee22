"""More and narrower heads: what they compute, and that merged models which have them are like any other."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageClassification, PreTrainedModel, ViTForImageClassification

from hf_zipit import merge
from hf_zipit.adapters import adapter_for
from hf_zipit.errors import ExpertError, ZipItError
from hf_zipit.modeling.head_dims import COUNTS, cut_heads, head_dim_name
from hf_zipit.symmetry.proof import model_tensors, perturb, run_with

from .. import tiny
from ..test_invariants import calibration

QUERIES = ("q_proj", "query", "q_lin")
KEYS = ("k_proj", "key", "k_lin")


def attention(model: nn.Module) -> dict[str, int]:
    """By path the width of a head."""
    names = {path: head_dim_name(module) for path, module in model.named_modules()}
    return {path: getattr(model.get_submodule(path), name) for path, name in names.items() if name}


def first_half_only(model: PreTrainedModel) -> tuple[dict, dict]:
    """Tensors whose logits need half of every head's width, and the same for heads of half the width.

    Of an old head both new ones have its logits, the first new one has the first half of its values.
    """
    old = perturb(model_tensors(model), torch.Generator().manual_seed(0))
    new = dict(old)
    for path, width in attention(model).items():
        for name in (*QUERIES, *KEYS):
            for leaf in ("weight", "bias"):
                if (full := f"{path}.{name}.{leaf}") in old:
                    halves = old[full].unflatten(0, (-1, 2, width // 2)).clone()
                    halves[:, 1] = 0
                    old[full] = halves.flatten(0, 2)
                    # logits are multiplied by one over the root of the width
                    scale = 0.5**0.5 if name in QUERIES else 1.0
                    new[full] = (halves[:, :1] * scale).expand_as(halves).flatten(0, 2)
    return old, new


@pytest.mark.parametrize(
    "name", ["vit", "clip", "bert-sequence", "distilbert-sequence", "roberta-masked", "roberta-prelayernorm", "dinov2"]
)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_narrower_heads_of_lower_rank_are_the_same_model(name: str, implementation: str):
    model = tiny.build(name)
    model.set_attn_implementation(implementation)
    old, new = first_half_only(model)
    cut = copy.deepcopy(model)
    cut_heads(cut, {path: width // 2 for path, width in attention(model).items()})
    inputs, fields = adapter_for(model).inputs(model), adapter_for(model).outputs(model)
    expected, found = run_with(model, old, inputs, fields), run_with(cut, new, inputs, fields)
    other = run_with(model, new, inputs, fields)
    for field, tensor in expected.items():
        torch.testing.assert_close(found[field], tensor, rtol=1e-4, atol=1e-5)
    assert any(not torch.allclose(other[field], tensor, rtol=1e-2) for field, tensor in expected.items())


@pytest.mark.parametrize("name", ["vit", "clip", "bert-sequence", "distilbert-sequence", "segformer"])
def test_number_and_width_of_heads_fit_each_other(name: str):
    model = tiny.build(name)
    before = {path: (width, counts(model, path)) for path, width in attention(model).items()}
    cut_heads(model, {path: width // 2 for path, (width, _) in before.items()})
    for path, (width, numbers) in before.items():
        assert numbers
        assert attention(model)[path] == width // 2
        assert counts(model, path) == {name: 2 * number for name, number in numbers.items()}


def counts(model: nn.Module, path: str) -> dict[str, int]:
    module = model.get_submodule(path)
    return {name: getattr(module, name) for name in COUNTS if hasattr(module, name)}


@pytest.mark.parametrize(
    ("dims", "says"),
    [
        ({"vit.layers.7.attention": 2}, "not a module of the trunk"),
        ({"vit.layers.0.mlp": 2}, "how wide its heads are"),
        ({"vit.layers.0.attention": 3}, "does not divide their width"),
        ({"vit.layers.0.attention": 0}, "does not divide their width"),
    ],
)
def test_what_cannot_be_cut(dims: dict[str, int], says: str):
    with pytest.raises(ZipItError, match=says):
        cut_heads(tiny.build("vit"), dims)


@pytest.fixture(scope="module")
def merged() -> PreTrainedModel:
    first, second = tiny.pair("vit")
    model = merge({"a": first, "b": second}, calibration(first), method="identity", refit=True)
    assert len(model.config.head_dims) == 2
    return model


def test_saved_and_loaded(merged: PreTrainedModel, tmp_path: Path):
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert loaded.config.head_dims == merged.config.head_dims
    inputs = adapter_for(tiny.build("vit")).inputs(tiny.build("vit"))
    for task in ("a", "b"):
        assert torch.equal(loaded(**inputs, task=task).logits, merged(**inputs, task=task).logits)


def test_the_model_is_as_large_as_an_expert(merged: PreTrainedModel):
    expert = tiny.pair("vit")[0]
    sizes = {name: tensor.shape for name, tensor in model_tensors(expert).items()}
    assert all(sizes[name] == tensor.shape for name, tensor in model_tensors(merged.trunk).items())


def test_a_task_is_a_plain_model_with_more_heads(merged: PreTrainedModel, tmp_path: Path):
    plain = merged.expert("a")
    heads = tiny.pair("vit")[0].config.num_attention_heads
    assert type(plain) is ViTForImageClassification
    assert plain.config.num_attention_heads == 2 * heads
    plain.save_pretrained(tmp_path)
    loaded = ViTForImageClassification.from_pretrained(tmp_path)
    inputs = adapter_for(plain).inputs(plain)
    torch.testing.assert_close(loaded(**inputs).logits, merged(**inputs, task="a").logits)


def test_a_number_of_heads_for_every_stage():
    models = [tiny.build("segformer", seed, num_attention_heads=[2, 2, 4, 8]) for seed in (0, 1)]
    inputs = calibration(models[0])
    merged = merge(dict(zip("ab", models, strict=True)), inputs, method="identity", refit=True)
    plain = merged.expert("a")
    assert plain.config.num_attention_heads == [4, 4, 8, 16]
    torch.testing.assert_close(plain(**inputs).logits, merged(**inputs, task="a").logits)


def test_heads_of_different_numbers_are_no_plain_model(merged: PreTrainedModel):
    some = copy.deepcopy(merged)
    some.config.head_dims.pop(next(iter(some.config.head_dims)))
    with pytest.raises(ExpertError, match=r"different numbers of heads; .* split_heads off"):
        some.expert("a")
