"""Every class of the tables: the inferred spec proves, covers every tensor, and groups attention by heads."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache

import pytest
import torch
import transformers as T

from benchmarks.smallest import smallest_model
from hf_zipit.errors import SpecError
from hf_zipit.symmetry import MergeSpec, prove
from hf_zipit.symmetry.proof import TOLERANCE, model_tensors
from hf_zipit.symmetry.spec import Factor, Symmetry
from tests.symmetry.checks import BROKEN, next_symmetries, spaces_of, with_symmetry, worst_error
from tests.tiny import EVERYTHING, IMAGE, REQUIRED, build, is_classifier, pair


@cache
def traced(name):
    model = build(name)
    return model, MergeSpec.from_model(model)


@pytest.mark.parametrize("name", EVERYTHING)
def test_proves(name):
    model, spec = traced(name)
    assert worst_error(model, spec) <= TOLERANCE
    assert any(spec.movable(space) for space in spec.spaces)
    assert not spec.unknown_ops


@pytest.mark.parametrize("name", REQUIRED)
def test_experts_of_a_pair_have_one_spec(name):
    """It depends on the architecture, not on the weights nor on the number of labels."""
    specs = [MergeSpec.from_model(model) for model in pair(name)]
    assert specs[0].axes == specs[1].axes
    movable = [{k: s for k, s in spec.spaces.items() if s.symmetry is not Symmetry.FIXED} for spec in specs]
    assert movable[0] == movable[1]
    if is_classifier(name):
        assert specs[0].spaces != specs[1].spaces


@pytest.mark.parametrize("name", EVERYTHING)
def test_every_axis_of_every_tensor_has_a_label_of_its_size(name):
    model, spec = traced(name)
    tensors = model_tensors(model)
    assert set(spec.axes) | spec.unused == set(tensors)
    assert not set(spec.axes) & spec.unused
    for tensor, labels in spec.axes.items():
        assert [spec.length(label) for label in labels] == list(tensors[tensor].shape), tensor


PROJECTIONS = {
    "vit": "vit.layers.0.attention.{q,k,v,o}_proj",
    "vit-eager": "vit.layers.0.attention.{q,k,v,o}_proj",
    "clip": "text_model.encoder.layers.1.self_attn.{q,k,v,out}_proj",
    "clip-vision": "vision_model.encoder.layers.1.self_attn.{q,k,v,out}_proj",
    "bert-sequence": "bert.encoder.layer.0.attention.{self.query,self.key,self.value,output.dense}",
    "roberta-masked": "roberta.encoder.layer.1.attention.{self.query,self.key,self.value,output.dense}",
    "distilbert-masked": "distilbert.transformer.layer.0.attention.{q,k,v,out}_lin",
}


@pytest.mark.parametrize("name", PROJECTIONS)
def test_attention_is_grouped_by_heads(name):
    _, spec = traced(name)
    before, _, rest = PROJECTIONS[name].partition("{")
    middle, _, after = rest.partition("}")
    query, key, value, out = (f"{before}{part}{after}.weight" for part in middle.split(","))
    heads, inner = spaces_of(spec, query, 0)
    assert (heads.size, heads.symmetry, heads.within) == (4, Symmetry.PERMUTATION, ())
    assert (inner.size, inner.symmetry, inner.within) == (8, Symmetry.LINEAR, (heads.name,))
    assert spaces_of(spec, key, 0) == [heads, inner]
    shared, dims = spaces_of(spec, value, 0)
    assert shared == heads
    assert (dims.size, dims.symmetry, dims.within) == (8, Symmetry.LINEAR, (heads.name,))
    assert dims.name != inner.name
    assert spaces_of(spec, out, 1) == [heads, dims]


@pytest.mark.parametrize("name", ["vit", "bert-masked", "clip-text", "resnet-basic", "resnet-bottleneck"])
def test_the_residual_stream_and_hidden_units_can_be_reordered(name):
    _, spec = traced(name)
    streams = [space for space in spec.spaces.values() if space.name.endswith("residual")]
    assert streams
    assert {space.symmetry for space in streams} == {Symmetry.PERMUTATION}
    if not name.startswith("resnet"):
        (stream,) = streams
        hidden = [s for s in spec.spaces.values() if s.size == 64 and not s.within]
        assert len(hidden) == 2
        assert {space.symmetry for space in hidden} == {Symmetry.PERMUTATION}
        assert stream.size == 32


def test_batch_norm_statistics_move_with_their_channels():
    _, spec = traced("resnet-basic")
    prefix = "resnet.encoder.stages.0.layers.0.layer.0"
    channels = spaces_of(spec, f"{prefix}.convolution.weight", 0)
    for tensor in ("weight", "bias", "running_mean", "running_var"):
        assert spaces_of(spec, f"{prefix}.normalization.{tensor}", 0) == channels
    assert [s.symmetry for s in channels] == [Symmetry.PERMUTATION]


def test_group_norm_splits_channels_into_groups():
    _, spec = traced("bit")
    norms = [name for name in spec.axes if ".norm" in name and name.endswith("weight")]
    assert norms
    assert {tuple(s.size for s in spaces_of(spec, name, 0))[0] for name in norms} == {8}


def test_what_is_read_only_for_its_shape_fixes_nothing():
    """BART slices a unit off its embeddings to ask how many tokens there are."""
    half = {"layers": 2, "attention_heads": 4}
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in half.items()}
    model = T.BartForConditionalGeneration(
        T.BartConfig(d_model=32, vocab_size=50, max_position_embeddings=20, **sides)
    )
    spec = MergeSpec.from_model(model)
    assert worst_error(model, spec) <= TOLERANCE
    assert not spec.unknown_ops
    assert spec.spaces["model.residual"].symmetry is Symmetry.PERMUTATION


def test_a_forward_pass_that_draws_at_random_is_proven():
    model = T.ViTMAEModel(T.ViTMAEConfig(**IMAGE))
    spec = MergeSpec.from_model(model)
    assert worst_error(model, spec) <= TOLERANCE
    assert any(spec.movable(name) for name in spec.spaces)


def test_windows_of_an_axis_that_is_counted_from_the_back():
    model = smallest_model(T.PatchTSMixerModel)
    assert worst_error(model, MergeSpec.from_model(model)) <= TOLERANCE


def test_modules_that_keep_what_follows_from_their_weights():
    """LeViT keeps its biases by place for the next pass; those of other weights, or of a trace, are let go of."""
    model = smallest_model(T.LevitForImageClassification)
    inputs = {"pixel_values": torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))}
    spec = MergeSpec.from_model(model)
    assert worst_error(model, spec) <= TOLERANCE
    with torch.no_grad():
        before = model(**inputs).logits
        assert MergeSpec.from_model(model, inputs) == spec
        assert torch.equal(model(**inputs).logits, before)


def test_what_mixes_tokens_is_not_observed_where_its_rows_are_units():
    """Rows that are those of other units in every expert do not tell which units correspond."""
    spec = MergeSpec.from_model(smallest_model(T.PatchTSMixerModel))
    observed = {name for probe in spec.probes for name in probe.key}
    mixing = {name for name in spec.spaces if "patch_mixer" in name and spec.movable(name)}
    assert mixing
    assert not observed & mixing
    assert any("feature_mixer" in name for name in observed)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_grouped_query_heads_move_with_their_key(name):
    _, spec = traced(name)
    prefix = "model.layers.0.self_attn"
    groups, copies, inner = spaces_of(spec, f"{prefix}.q_proj.weight", 0)
    assert spaces_of(spec, f"{prefix}.k_proj.weight", 0) == [groups, inner]
    assert spaces_of(spec, f"{prefix}.v_proj.weight", 0)[0] == groups
    assert (groups.size, copies.size, copies.within) == (2, 2, (groups.name,))
    # Qwen3 scales every unit of a query before it is rotated.
    assert inner.symmetry is (Symmetry.ROTARY if name == "llama" else Symmetry.HALF_TURNS)
    assert inner.within == (groups.name,)
    assert spaces_of(spec, f"{prefix}.v_proj.weight", 0)[1].symmetry is Symmetry.LINEAR


# The check can fail --------------------------------------------------------------------------------------------------

CORRUPTED = ["vit", "bert-masked", "clip", "resnet-basic", "llama"]


@pytest.mark.parametrize("name", CORRUPTED)
def test_one_symmetry_too_many_does_not_prove(name):
    """For every kind of space that is not free, claiming the next larger group for it must show."""
    model, spec = traced(name)
    tried = set()
    for space in spec.spaces.values():
        kind = (space.symmetry, bool(space.within), space.name.endswith("residual"))
        if space.symmetry in (Symmetry.PERMUTATION, Symmetry.ROTARY) and space.size > 2 and kind not in tried:
            tried.add(kind)
            # Not merely orthogonal: a rotation of positions or rows may be harmless by accident of a mean.
            for more in next_symmetries(space):
                assert worst_error(model, with_symmetry(spec, space.name, more)) > BROKEN, (space, more)
    assert tried


@pytest.mark.parametrize("name", CORRUPTED)
def test_a_label_swapped_for_another_of_its_size_does_not_prove(name):
    model, spec = traced(name)
    rng = random.Random(0)
    tried = 0
    for tensor in rng.sample(sorted(spec.axes), len(spec.axes)):
        for axis, label in enumerate(spec.axes[tensor]):
            others = [
                s for s in spec.spaces.values()
                if len(label) == 1 and s.name != label[0].space and s.size == spec.spaces[label[0].space].size
                and not s.within and spec.movable(s.name) and spec.movable(label[0].space)
                and not spec.spaces[label[0].space].within
            ]  # fmt: skip
            if others and tried < 5:
                tried += 1
                labels = list(spec.axes[tensor])
                labels[axis] = (Factor(others[0].name, label[0].dual),)
                wrong = replace(spec, axes={**spec.axes, tensor: tuple(labels)})
                assert worst_error(model, wrong) > BROKEN, (tensor, axis)
    assert tried


def test_a_dual_taken_for_a_vector_does_not_prove():
    model, spec = traced("vit")
    tensor = "vit.layers.0.attention.k_proj.weight"
    (heads, inner), stream = spec.axes[tensor]
    wrong = replace(spec, axes={**spec.axes, tensor: ((heads, replace(inner, dual=not inner.dual)), stream)})
    assert worst_error(model, wrong) > BROKEN


# What tracing and proving leave alone --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "bert-masked", "resnet-basic"])
def test_the_model_is_left_as_it_was(name):
    model = build(name)
    model.train()
    list(model.modules())[3].eval()
    modes = [module.training for module in model.modules()]
    before = {key: tensor.clone() for key, tensor in model_tensors(model).items()}
    prove(model, MergeSpec.from_model(model))
    assert [module.training for module in model.modules()] == modes
    after = model_tensors(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["vit", "bert-masked", "clip", "resnet-basic", "llama"])
def test_models_in_other_dtypes_are_traced_and_proven_in_float32(name, dtype):
    model = build(name).to(dtype)
    spec = MergeSpec.from_model(model)
    assert spec.axes == traced(name)[1].axes
    assert worst_error(model, spec) <= TOLERANCE
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_the_proof_is_the_same_for_the_same_seed_and_another_for_another():
    model, spec = traced("vit")
    assert prove(model, spec, seed=4) == prove(model, spec, seed=4)
    assert len({prove(model, spec, seed=seed) for seed in range(4)}) > 1


def test_weights_that_are_not_finite_prove_nothing():
    model = build("vit")
    spec = MergeSpec.from_model(model)
    with torch.no_grad():
        model.vit.layernorm.weight[0] = float("nan")
    with pytest.raises(SpecError, match="not finite"):
        prove(model, spec)
