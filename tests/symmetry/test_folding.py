"""Folding: a folded model computes what it computed, has no scales left, and its stream can be rotated, proven so."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from hf_zipit.errors import ExpertError
from hf_zipit.symmetry import MergeSpec, prove
from hf_zipit.symmetry.folding import fold
from hf_zipit.symmetry.proof import TOLERANCE, model_tensors
from hf_zipit.symmetry.spec import Symmetry
from tests.symmetry.checks import worst_error
from tests.test_invariants import assert_same, calibration, in_general_position, outputs
from tests.tiny import TRUNKS, build, mostly_seldom

STREAMS = {
    "vit": (5, Symmetry.ORTHOGONAL_ONES),
    "deit": (5, Symmetry.ORTHOGONAL_ONES),
    "clip-text": (5, Symmetry.ORTHOGONAL_ONES),
    "gpt2": (5, Symmetry.ORTHOGONAL_ONES),
    "llama": (5, Symmetry.ORTHOGONAL),
    "qwen3": (5, Symmetry.ORTHOGONAL),
}
"""How many norms are folded (two a block and the last one), and what the stream allows then."""

LEFT_ALONE = ["bert-masked", "roberta-prelayernorm", "clip-vision", "vit-features", "dinov2", "resnet-basic", "bit"]
"""The norm's output is (also) the stream, an output, or scaled in between: nothing can be folded."""


def general(name):
    return in_general_position(build(name), torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", mostly_seldom([*TRUNKS, "clip-text", "vit-features"], 2))
def test_a_folded_model_computes_the_same_and_its_spec_proves(name):
    model = general(name)
    spec = MergeSpec.from_model(model, folding=True)
    folded = fold(model, spec.folds)
    inputs = calibration(model)
    assert_same(outputs(folded, inputs, model), outputs(model, inputs, model), 1e-5)
    assert worst_error(build(name), spec) <= TOLERANCE
    tensors = model_tensors(folded)
    for norm in spec.folds:
        assert torch.equal(tensors[norm.weight], torch.ones_like(tensors[norm.weight]))
        assert not torch.equal(model_tensors(model)[norm.weight], tensors[norm.weight])


@pytest.mark.parametrize("name", STREAMS)
def test_a_pre_norm_stream_can_be_rotated(name):
    spec = MergeSpec.from_model(build(name), folding=True)
    count, symmetry = STREAMS[name]
    assert len(spec.folds) == count
    (stream,) = (s for s in spec.spaces.values() if s.name.endswith("residual"))
    assert stream.symmetry is symmetry


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_cannot_be_folded_is_left_alone(name):
    model = build(name)
    assert MergeSpec.from_model(model, folding=True) == MergeSpec.from_model(model)


def test_only_one_tower_of_clip_can_be_rotated():
    spec = MergeSpec.from_model(build("clip"), folding=True)
    assert all(norm.weight.startswith("text_model") for norm in spec.folds)
    assert spec.spaces["text_model.residual"].symmetry is Symmetry.ORTHOGONAL_ONES
    assert spec.spaces["vision_model.residual"].symmetry is Symmetry.PERMUTATION


def test_a_spec_of_folded_norms_does_not_prove_of_others():
    """The check can fail: with the scales left in the norms a rotation changes what is computed."""
    model = general("vit")
    spec = MergeSpec.from_model(model, folding=True)
    assert prove(model, spec) <= TOLERANCE
    assert prove(model, replace(spec, folds=())) > 1e-2


def test_shifts_go_into_biases_where_all_readers_have_one():
    model = general("clip-text")
    spec = MergeSpec.from_model(model, folding=True)
    tensors = model_tensors(fold(model, spec.folds))
    kept = [norm.bias for norm in spec.folds if tensors[norm.bias].any()]
    assert kept == ["text_model.final_layer_norm.bias"]  # its reader, the text projection, has no bias
    before = model_tensors(model)
    near = before[kept[0]] / before["text_model.final_layer_norm.weight"]
    torch.testing.assert_close(tensors[kept[0]], near)


def test_a_shift_that_cannot_stay_is_told():
    model = general("clip-text")
    spec = MergeSpec.from_model(model, folding=True)
    with torch.no_grad():
        model.text_model.final_layer_norm.weight[3] = 0
    with pytest.raises(ExpertError, match="final_layer_norm.weight of the expert 'x'.*text_projection"):
        fold(model, spec.folds, "the expert 'x'")


def test_the_model_is_left_as_it_was_and_shares_what_does_not_change():
    model = general("vit")
    before = copy.deepcopy(model_tensors(model))
    spec = MergeSpec.from_model(model, folding=True)
    folded = fold(model, spec.folds)
    after = model_tensors(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    changed = {norm.weight for norm in spec.folds} | {norm.bias for norm in spec.folds}
    changed |= {r.weight for norm in spec.folds for r in norm.readers}
    changed |= {r.bias for norm in spec.folds for r in norm.readers}
    own = model_tensors(folded)
    assert {name for name in own if own[name].data_ptr() != after[name].data_ptr()} == changed


def test_tied_tables_are_untied():
    model = general("gpt2")
    tensors = model_tensors(model)
    assert tensors["lm_head.weight"].data_ptr() == tensors["transformer.wte.weight"].data_ptr()
    folded = model_tensors(fold(model, MergeSpec.from_model(model, folding=True).folds))
    assert torch.equal(folded["transformer.wte.weight"], tensors["transformer.wte.weight"])
    assert not torch.equal(folded["lm_head.weight"], tensors["lm_head.weight"])


def test_half_precision_is_folded_in_float32():
    model = general("vit").to(torch.bfloat16)
    folded = fold(model, MergeSpec.from_model(model, folding=True).folds)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in folded.parameters()} == {torch.float32}


class Shared(nn.Module):
    """One norm, read by a linear layer and by something else as told."""

    def __init__(self, reader):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.out, self.reader, self.number = nn.Linear(8, 3), reader, nn.Parameter(torch.ones(()))

    def forward(self, x):
        stream = self.first(x)
        normed = self.norm(stream)
        return self.out(stream + self.reader(self, normed))


READERS = {
    "a linear layer": (lambda m, y: m.last(y), 1),
    "a linear layer, of some rows": (lambda m, y: m.last(y[:, 1:].mean(1, keepdim=True)), 1),
    "a layer that runs twice": (lambda m, y: m.last(m.last(y)), 0),
    "a nonlinearity": (lambda m, y: m.last(torch.relu(y)), 0),
    "a mean, which a number multiplies": (lambda m, y: m.last(y) * (m.number * y.mean()), 0),
    "the stream as well": (lambda m, y: m.last(y) + y, 0),
    "a part of the units": (lambda m, y: nn.functional.pad(m.last(y)[..., :1] + y[..., 1:], (0, 1)), 0),
}


@pytest.mark.parametrize("what", READERS)
def test_only_norms_that_linear_layers_read_are_folded(what):
    reader, count = READERS[what]
    spec = MergeSpec.from_model(Shared(reader), {"x": torch.randn(2, 4, 5)}, folding=True)
    assert len(spec.folds) == count
