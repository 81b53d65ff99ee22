"""Where activations say nothing weights decide: spaces that nothing observes, units that all do the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import permutations

import pytest
import torch
import transformers as T
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_zipit import merge
from hf_zipit.adapters import adapter_for
from hf_zipit.align.align import align
from hf_zipit.align.by_weights import ambiguous_units, told_apart
from hf_zipit.align.method import Network
from hf_zipit.combine.combine import merge_tensor
from hf_zipit.symmetry import MergeSpec
from hf_zipit.symmetry.group import apply_element, random_element
from hf_zipit.symmetry.proof import model_tensors, perturb
from hf_zipit.symmetry.spec import Factor
from hf_zipit.symmetry.trace import select_outputs
from tests import tiny
from tests.align.toys import correlation, space, spec_of

SWINV2 = {"image_size": 32, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
MOBILEVIT = {"image_size": 32, "patch_size": 2, "hidden_sizes": [16, 24, 32], "num_attention_heads": 2,
             "neck_hidden_sizes": [8, 8, 16, 16, 16, 16, 32]}  # fmt: skip
BACKBONE = T.ResNetConfig(**tiny.BASIC, out_features=["stage2"])
DETR = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "backbone_config": BACKBONE,
        "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_queries": 5}  # fmt: skip
FALCON = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
EFFICIENTNET = {"image_size": 32, "width_coefficient": 1.0, "depth_coefficient": 1.0, "in_channels": [32, 16],
                "out_channels": [16, 24], "kernel_sizes": [3, 3], "strides": [1, 2], "num_block_repeats": [1, 2],
                "expand_ratios": [1, 2], "depthwise_padding": [], "hidden_dim": 1280}  # fmt: skip
DEEPSEEK = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 16,
            "num_hidden_layers": 1, "first_k_dense_replace": 0, "n_routed_experts": 6, "n_group": 2, "topk_group": 1,
            "num_experts_per_tok": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 8,
            "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
            "pad_token_id": 0}  # fmt: skip

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    # Its linear layers call `matmul`, so that no probe sees what is between those of its MLP.
    "falcon": tiny.of(T.FalconForCausalLM, T.FalconConfig, **FALCON),
    # Units that are dead, constant or multiples of each other: behind ReLU, for queries that do not depend on the
    # image, of a table of relative positions.
    "swinv2": tiny.of(T.Swinv2ForImageClassification, T.Swinv2Config, **SWINV2),
    "mobilenet-v2": tiny.EXTRA["mobilenet-v2"],
    "efficientnet": tiny.of(T.EfficientNetForImageClassification, T.EfficientNetConfig, **EFFICIENTNET),
    "mobilevit": tiny.of(T.MobileViTForImageClassification, T.MobileViTConfig, **MOBILEVIT),
    "detr": tiny.of(T.DetrForObjectDetection, T.DetrConfig, **DETR),
    # The hidden units of its experts are two levels deep: in an expert, which is in a group.
    "deepseek": tiny.of(T.DeepseekV3ForSequenceClassification, T.DeepseekV3Config, **DEEPSEEK),
    # A layer of its reads the stream head by head, so that the heads are rows there.
    "wavlm": tiny.of(T.WavLMForCTC, T.WavLMConfig, **{**tiny.WAV2VEC2, "num_hidden_layers": 1}),
}


@pytest.mark.parametrize(
    ("name", "method"),
    [*tiny.mostly_seldom(((name, "permute") for name in MODELS), 2), ("swinv2", "zip"), ("falcon", "zip")],
)
def test_a_model_merged_with_its_permuted_copy_is_that_model(name, method):
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    model = MODELS[name]()
    spec = MergeSpec.from_model(model)
    tensors = perturb(model_tensors(model), generator)
    moved = apply_element(tensors, spec, random_element(spec, generator, permutations_only=True))
    experts = {"a": holding(model, tensors), "b": holding(model, moved)}
    inputs = {n: example(x, generator) for n, x in adapter_for(model).inputs(model).items() if isinstance(x, Tensor)}
    whole = merge(experts, inputs, method=method)
    fields = adapter_for(model).outputs(model)
    for task, expert in experts.items():
        with torch.no_grad():
            found, expected = (
                select_outputs(m(**inputs, **t), fields) for m, t in ((whole, {"task": task}), (expert, {}))
            )
        for field, tensor in expected.items():
            assert (found[field] - tensor).abs().max() <= 1e-5 * tensor.abs().max(), field


def holding(model: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    made = copy.deepcopy(model).eval()
    with torch.no_grad():
        for name, tensor in model_tensors(made).items():
            tensor.copy_(tensors[name])
    return made


def example(x: Tensor, generator: torch.Generator) -> Tensor:
    """More of the adapter's example inputs."""
    shape = (12, *x.shape[1:])
    if x.is_floating_point():
        return torch.randn(shape, generator=generator)
    return torch.randint(3, 50, shape, generator=generator) if x.max() > 1 else x[:1].expand(shape)


# One layer: inputs - hidden - outputs.

LABELS = {
    "up.weight": ((Factor("hidden"),), (Factor("inputs", dual=True),)),
    "down.weight": ((Factor("outputs"),), (Factor("hidden", dual=True),)),
}
SPEC = spec_of(
    space("hidden", 9), space("inputs", 6, fixed=True), space("outputs", 4, fixed=True), axes=LABELS
)  # fmt: skip


def layer(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"up.weight": torch.randn(9, 6, generator=generator), "down.weight": torch.randn(4, 9, generator=generator)}


def features(seed: int, dead: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(9, 40, generator=generator)
    x[torch.randperm(9, generator=generator)[:dead]] = 0
    return x


def test_a_space_that_nothing_observes_is_matched_by_its_weights():
    weights, order = layer(0), torch.randperm(9, generator=torch.Generator().manual_seed(1))
    moved = {"up.weight": weights["up.weight"][order], "down.weight": weights["down.weight"][:, order]}
    found = align(SPEC, {}, 2, "permute", weights=[weights, moved])["hidden"]
    assert torch.equal(found.labels[1], order)


@pytest.mark.parametrize("method", ["permute", "zip"])
@pytest.mark.parametrize("seed", range(4))
def test_dead_units_of_three_experts_are_merged_the_same_in_every_order(method, seed):
    """Each expert has other dead units, and another number of them."""
    weights = [layer(10 * seed + t) for t in range(3)]
    doing = [features(10 * seed + t, dead=2 + t) for t in range(3)]
    results = []
    for order in permutations(range(3)):
        acting = {("hidden",): correlation(*(doing[t] for t in order))}
        own = [weights[t] for t in order]
        maps = align(SPEC, acting, 3, method, weights=own)
        merged = {name: merge_tensor([w[name] for w in own], labels, maps, SPEC) for name, labels in LABELS.items()}
        results.append(merged["down.weight"] @ (merged["up.weight"] @ torch.eye(6)).relu())
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def test_units_are_ambiguous_that_are_dead_or_have_a_twin_in_their_own_expert():
    x, y = features(0, 0), features(1, 0)
    x[2], x[5], y[1] = 0, 3 * x[4], -y[0]
    found = ambiguous_units(correlation(x, y), 2)
    assert found.nonzero().flatten().tolist() == [2, 4, 5]


def test_weights_change_nothing_where_activations_tell_all_units_apart():
    acting = {("hidden",): correlation(features(0, 0), features(1, 0))}
    assert told_apart(Network(SPEC, 2, weights=[layer(0), layer(1)]), acting, {}, ["hidden"]) == {}


def test_weights_change_only_what_ambiguous_units_have_to_do_with():
    acting = correlation(features(0, 2), features(1, 0))
    network = Network(SPEC, 2, weights=[layer(0), layer(1)])
    found = told_apart(network, {("hidden",): acting}, {}, ["hidden"])["hidden",]
    dead = acting.diagonal() == 0
    assert torch.equal(found[~dead][:, ~dead], acting[~dead][:, ~dead])
    assert 0 < (found - acting).abs().max() <= 5e-6
