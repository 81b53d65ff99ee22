"""Inputs that a user gives for the trace, and the plain torch modules that need them."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers as T
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

import hf_zipit
from benchmarks.coverage import in_general_position, samples
from benchmarks.smallest import smallest_model
from hf_zipit.adapters import adapter_for
from hf_zipit.adapters.signature import boxes, packed, patches, series, sound, videos
from hf_zipit.data.calibration import MicroBatch
from hf_zipit.errors import DataError, RecipeError, SpecError
from hf_zipit.refit import RefitReport
from hf_zipit.refit.stage import check_grids
from hf_zipit.symmetry import MergeSpec, prove
from hf_zipit.symmetry.group import apply_element, random_element
from hf_zipit.symmetry.proof import TOLERANCE, model_tensors


class Plain(nn.Module):
    """A convolution, a norm, an encoder layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.out(self.layer(self.net(pixels).flatten(2).mT).mean(1))


INPUTS = {"pixels": torch.randn(2, 3, 5, 5)}


def reordered_pair():
    torch.manual_seed(0)
    model = Plain().eval()
    spec = MergeSpec.from_model(model, INPUTS)
    moved = apply_element(
        model_tensors(model), spec, random_element(spec, torch.Generator().manual_seed(1), permutations_only=True)
    )
    other = copy.deepcopy(model)
    other.load_state_dict(moved)
    return {"a": model, "b": other}


@pytest.mark.parametrize("data", [None, {"pixels": torch.randn(64, 3, 5, 5)}])
def test_a_plain_module_and_its_reordered_copy_become_one_of_their_class(data):
    experts = reordered_pair()
    merged = hf_zipit.merge(experts, data, example_inputs=INPUTS)
    assert type(merged) is Plain and not merged.training
    assert torch.allclose(merged(**INPUTS), experts["a"](**INPUTS), atol=1e-5)


def test_what_a_plain_module_cannot_have_is_said_in_a_sentence():
    experts = reordered_pair()
    with pytest.raises(SpecError, match="example_inputs"):
        hf_zipit.merge(experts)
    with pytest.raises(RecipeError, match="plain torch module"):
        hf_zipit.merge(experts, INPUTS, example_inputs=INPUTS, refit={})
    with pytest.raises(DataError, match="example_inputs"):
        hf_zipit.merge(experts, example_inputs=[INPUTS])


def test_given_inputs_decide_what_is_traced():
    config = T.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, vocab_size=20,
        max_position_embeddings=9,
    )  # fmt: skip
    experts = {task: T.BertForMaskedLM(config) for task in "ab"}
    given = {"inputs_embeds": torch.randn(2, 3, 8), "attention_mask": torch.ones(2, 3)}
    planned = hf_zipit.plan(experts, data=False, example_inputs=given)
    assert planned.spec.outputs and planned.spec.macs
    assert any("inputs_embeds" in (space.frozen_by or "") for space in planned.spec.spaces.values())
    with pytest.raises(SpecError, match="example_inputs"):
        hf_zipit.plan(experts, data=False, example_inputs={"pixels": torch.randn(2, 3)})


@pytest.mark.parametrize(
    ("config", "accepted", "shapes"),
    [
        ({"num_mel_bins": 8, "max_source_positions": 5}, "input_features", {"input_features": (2, 8, 10)}),
        ({"num_mel_bins": 8, "max_length": 32}, "input_values", {"input_values": (2, 32, 8)}),
        ({"feature_projection_input_dim": 12}, "input_features", {"input_features": (2, 64, 12)}),
        ({"conv_kernel": [3], "conv_stride": [2]}, "input_values", {"input_values": (2, 15)}),
        ({"audio_channels": 1}, "input_values", {"input_values": (2, 1, 1920)}),
        ({}, "input_ids", {}),
    ],
)
def test_sound_has_the_sizes_of_the_configuration(config, accepted, shapes):
    made = sound(SimpleNamespace(**config), [accepted], torch.Generator())
    assert {name: tuple(tensor.shape) for name, tensor in made.items()} == shapes


def test_clips_and_series_have_the_sizes_of_the_configuration():
    generator = torch.Generator()
    clip = SimpleNamespace(frames_per_clip=3, crop_size=8, in_chans=1)
    assert videos(clip, ["pixel_values_videos"], generator)["pixel_values_videos"].shape == (2, 3, 1, 8, 8)
    past = SimpleNamespace(context_length=4, lags_sequence=[1, 3], prediction_length=2, num_time_features=1)
    accepted = ["past_values", "past_observed_mask", "future_values", "future_time_features"]
    made = series(past, accepted, generator)
    assert list(made) == ["past_values", "future_values", "future_time_features", "past_observed_mask"]
    assert [made[name].shape[1] for name in accepted] == [7, 7, 2, 2]
    assert boxes(["bbox"], 5)["bbox"].shape == (2, 5, 4)


def test_images_with_grids_are_cut_into_patches_and_given_in_one_row():
    config = SimpleNamespace(patch_size=4, temporal_patch_size=2, spatial_merge_size=2, in_channels=1)
    made = patches(config, ["hidden_states", "grid_thw"], torch.Generator())
    assert made["hidden_states"].shape == (2, 16, 32)
    assert made["grid_thw"].prod(1).tolist() == [16, 16]
    assert packed(made)["hidden_states"].shape == (32, 32)
    assert packed({"hidden_states": made["hidden_states"]})["hidden_states"].shape == (2, 16, 32)
    shaped = patches(config, ["pixel_values", "spatial_shapes"], torch.Generator())
    assert packed(shaped)["pixel_values"].shape == (2, *shaped["pixel_attention_mask"].shape[1:], 16)
    assert not patches(config, ["hidden_states"], torch.Generator())


def test_a_trace_holds_for_one_grid():
    model = smallest_model(Qwen2_5_VisionTransformerPretrainedModel)
    made = adapter_for(model).inputs(model)
    longer = {"hidden_states": made["hidden_states"], "grid_thw": torch.tensor([[1, 2, 8]] * 2)}
    for inputs in (made, longer):
        assert prove(model, MergeSpec.from_model(model, inputs), inputs=inputs) <= TOLERANCE


def test_a_refit_takes_images_of_one_grid():
    experts = {task: in_general_position("Siglip2VisionModel", seed) for seed, task in enumerate("ab")}
    data = samples(experts["a"])
    steps = {"attention_steps": 0, "unit_steps": 0, "answer_steps": 0}
    report = RefitReport.of(hf_zipit.merge(experts, data, method="permute", refit=steps, corrections={}))
    assert report.untouched == ("embeddings.position_embedding.weight",)
    check_grids(experts["a"], [MicroBatch(data, None, real=24)] * 2)
    others = {**data, "spatial_shapes": data["spatial_shapes"].flip(1)}
    with pytest.raises(SpecError, match="Siglip2VisionModel is told by spatial_shapes.*refit=None"):
        check_grids(experts["a"], [MicroBatch(inputs, None, real=24) for inputs in (data, others)])


@pytest.mark.parametrize("model_class", [T.Siglip2Model, T.Qwen2VLModel])
def test_images_of_patches_reach_tower_and_text(model_class):
    model = smallest_model(model_class)
    spec = MergeSpec.from_model(model)
    assert {name for name, _ in model.named_parameters()} <= spec.axes.keys()
    assert prove(model, spec) <= TOLERANCE


def test_texts_without_images_need_example_inputs_without_them():
    text = {"input_ids": torch.randint(3, 50, (4, 6))}
    experts = dict.fromkeys("ab", smallest_model(T.Qwen2VLModel))
    with pytest.raises(SpecError, match="does not call that module.*example_inputs"):
        hf_zipit.merge(experts, text, method="permute", refit=None)
    hf_zipit.merge(experts, text, method="permute", refit=None, example_inputs=text)


def test_texts_have_as_many_image_tokens_as_their_images_need():
    vision = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
    text = {**vision, "vocab_size": 30, "model_type": "llama"}
    vision |= {"image_size": 8, "patch_size": 4, "model_type": "clip_vision_model"}
    model = T.LlavaForConditionalGeneration(
        T.LlavaConfig(vision_config=vision, text_config=text, image_token_index=29, vision_feature_layer=-1)
    )
    inputs = adapter_for(model).inputs(model)
    assert (inputs["input_ids"] == 29).sum(1).tolist() == [4, 4]
    assert prove(model, MergeSpec.from_model(model)) <= TOLERANCE
