"""Changes of basis that are more than permutations: a copy of a model, turned by any element of its symmetry group
(the streams of a folded model rotated, the inside of heads by any invertible map), merges into that model again.
"""

from __future__ import annotations

import logging
from itertools import product

import pytest
import torch

from hf_zipit import merge, plan
from hf_zipit.align.align import residual_spaces
from hf_zipit.align.procrustes import rotating
from hf_zipit.align.stage import align_trunk
from hf_zipit.modeling.entries import DenseEntry, IndexEntry
from hf_zipit.observation import observe
from hf_zipit.registry import METHODS
from hf_zipit.symmetry import MergeSpec
from hf_zipit.symmetry.folding import fold
from hf_zipit.symmetry.group import apply_element, random_element
from hf_zipit.symmetry.proof import model_tensors
from hf_zipit.symmetry.spec import Symmetry
from tests import tiny
from tests.test_invariants import (
    assert_bit_identical,
    assert_same,
    calibration,
    experts,
    in_general_position,
    outputs,
    with_tensors,
)

ROTATING = ["vit", "clip", "llama", "gpt2"]
PERMUTING = ["bert-masked", "bert-sequence", "clip-vision", "resnet-basic", "bit"]
TURNING = ["orthogonal", "circuits"]


def turned(name, copies=1, permutations_only=False, inside=True):
    """A model, and copies of it turned by random elements of the group of its folded form, inside the heads or not."""
    generator = torch.Generator().manual_seed(1)
    model = in_general_position(tiny.build(name), generator)
    spec = MergeSpec.from_model(model, folding=True)
    folded = fold(model, spec.folds)
    models = [model]
    for _ in range(copies):
        element = random_element(spec, generator, permutations_only)
        if not inside:
            element = {n: g for n, g in element.items() if not spec.spaces[n].within}
        models.append(with_tensors(folded, apply_element(model_tensors(folded), spec, element)))
    return models


def merged(models, method, **settings):
    data = None if settings.pop("blind", False) else calibration(models[0])
    return merge(dict(zip("abc", models, strict=False)), data, method=method, **settings)


def assert_computes(result, models, tolerance=1e-4):
    inputs = calibration(models[0])
    for task, model in zip("abc", models, strict=False):
        assert_same(outputs(result, inputs, model, task=task), outputs(model, inputs, model), tolerance)


@pytest.mark.parametrize(
    ("name", "method"),
    tiny.mostly_seldom(product([*ROTATING, *PERMUTING, "qwen3", "roberta-prelayernorm", "vit-features"], TURNING), 2),
)
def test_a_turned_copy_is_recovered(name, method):
    models = turned(name)
    assert_computes(merged(models, method, blind=method == "circuits"), models)


@pytest.mark.parametrize("name", ROTATING)
def test_it_is_lost_to_permutations(name):
    """Without this, the test above could hold by accident."""
    models = turned(name)
    for method in ("permute", "weights"):
        with pytest.raises(AssertionError):
            assert_computes(merged(models, method), models, 1e-2)


@pytest.mark.parametrize("method", TURNING)
@pytest.mark.parametrize("name", ["vit", "llama"])
def test_two_turned_copies_are_recovered_at_every_depth(name, method):
    first, *others = turned(name, copies=2)
    models = (others[0], first, others[1])
    for depth in (0, 0.5, 1.0):
        assert_computes(merged(models, method, depth=depth), models)


@pytest.mark.parametrize("method", TURNING)
def test_heads_alone_are_recovered_where_the_stream_cannot_turn(method):
    """BERT's norm puts out the stream; inside its heads any invertible map is free."""
    models = turned("bert-sequence")
    spec = MergeSpec.from_model(models[0], folding=True)
    assert not spec.folds
    assert not rotating(spec)
    assert_computes(merged(models, method), models)


@pytest.mark.parametrize("method", METHODS.names())
def test_pairs_under_rotary_embeddings_are_turned_by_methods_that_know_how(method):
    """For all others they stay what they are: without a map."""
    models = dict(zip("ab", experts("llama"), strict=True))
    planned = plan(models, method=method)
    moments = None
    if "moments" in METHODS.get(method).needs:
        moments = observe(planned, calibration(models["a"]))
    found = align_trunk(planned, moments)
    rotary = {name for name, space in planned.spec.spaces.items() if space.symmetry is Symmetry.ROTARY}
    assert len(rotary) == 2
    movable = {name for name in planned.spec.spaces if planned.spec.movable(name)}
    assert set(found) == (movable if method in TURNING else movable - rotary)
    for name in rotary & set(found):
        pairs = found[name].matrices[1].unflatten(-1, (2, -1)).unflatten(-3, (2, -1))
        off = pairs * (1 - torch.eye(pairs.shape[-1]).double()[:, None])
        assert float(off.abs().max()) < 1e-9
        assert not found[name].unchanged(1)


STREAM_ONLY = [name for name in METHODS.names() if name != "identity"]


@pytest.mark.parametrize(("name", "method"), tiny.mostly_seldom(product(["vit", "llama"], STREAM_ONLY), 2))
def test_residual_orthogonal_turns_the_stream_back_under_every_method(name, method):
    models = turned(name, inside=False)
    assert_computes(merged(models, method, residual="orthogonal"), models)


def test_an_override_of_the_stream_wins_over_residual_orthogonal():
    models = turned("vit", inside=False)
    with pytest.raises(AssertionError):
        result = merged(models, "permute", residual="orthogonal", overrides={"*residual": "permute"})
        assert_computes(result, models, 1e-2)


def test_what_cannot_be_rotated_is_said_once_and_matched(caplog):
    models = turned("bert-sequence", permutations_only=True)
    with caplog.at_level(logging.INFO, logger="hf_zipit.align.align"):
        result = merged(models, "permute", residual="orthogonal")
    assert [record.name for record in caplog.records].count("hf_zipit.align.align") == 1
    assert "BertForSequenceClassification" in caplog.text
    assert_computes(result, models)


def test_doors_are_matrices_where_the_stream_turns_and_the_model_saves_and_loads(tmp_path):
    models = turned("vit")
    result = merged(models, "orthogonal", depth=0.5)
    readouts = [readout for task in result.entries.values() for readout in task]
    assert readouts
    assert all(isinstance(readout, DenseEntry) for readout in readouts)
    assert all(isinstance(d, IndexEntry) for task in merged(models, "cca", depth=0.5).entries.values() for d in task)
    result.save_pretrained(tmp_path)
    loaded = type(result).from_pretrained(tmp_path)
    assert_bit_identical(dict(loaded.state_dict()), dict(result.state_dict()))
    assert_computes(loaded, models)


def test_the_merged_model_has_unit_norms_where_they_were_folded():
    models = turned("vit")
    planned = plan(dict(zip("ab", models, strict=True)), method="orthogonal")
    assert len(planned.spec.folds) == 5
    assert planned.to_dict()["folded"] == [norm.weight for norm in planned.spec.folds]
    trunk = model_tensors(merged(models, "orthogonal").trunk)
    for norm in planned.spec.folds:
        assert torch.equal(trunk[norm.weight], torch.ones_like(trunk[norm.weight]))
        assert not trunk[norm.bias].any()


@pytest.mark.parametrize("method", ["zip", "permute", "cca"])
def test_nothing_is_folded_unless_a_method_asks(method):
    models = experts("vit")
    assert not plan(dict(zip("ab", models, strict=True)), method=method).spec.folds


@pytest.mark.parametrize("method", TURNING)
@pytest.mark.parametrize("name", ["vit", "llama"])
@pytest.mark.parametrize(
    "settings",
    [
        {"refit": True},
        {"refit": True, "depth": 0.5},
        {"corrections": ["repair"]},
        {"corrections": {"repair": {"statistics": "moments"}}},
        {"corrections": ["rescale-shift"]},
    ],
    ids=["refit", "refit to half", "repair", "repair from moments", "rescale-shift"],
)
def test_later_stages_leave_a_turned_copy_alone(name, method, settings):
    if method == "circuits" and isinstance(settings.get("corrections"), dict):
        pytest.skip("circuits gathers no moments")
    models = turned(name)
    assert_computes(merged(models, method, **settings), models)


def test_residual_orthogonal_of_unrelated_experts_is_independent_of_their_order():
    models = experts("vit", 3)
    inputs = calibration(models[0])
    for method in ("zip", "weights"):
        settings = {"method": method, "residual": "orthogonal"}
        there = merge(dict(zip("abc", models, strict=True)), inputs, **settings)
        back = merge(dict(reversed(list(zip("abc", models, strict=True)))), inputs, **settings)
        for task, model in zip("abc", models, strict=True):
            assert_same(outputs(back, inputs, model, task=task), outputs(there, inputs, model, task=task), 1e-4)


def test_residual_orthogonal_rotates_residual_streams_only():
    models = experts("vit")
    planned = plan(dict(zip("ab", models, strict=True)), residual="orthogonal")
    assert set(rotating(planned.spec)) == set(residual_spaces(planned.spec)) == {"vit.residual"}
