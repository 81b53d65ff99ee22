"""Rules that merge layer by layer: the walk against models that are run anew for every layer."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from hf_zipit import merge, plan
from hf_zipit.data.calibration import Calibration
from hf_zipit.errors import DataError
from hf_zipit.layerwise.stage import combined_trunk
from hf_zipit.symmetry.proof import model_tensors
from tests import tiny

ORDER = [
    "embeddings.patch_embeddings.projection",
    *(f"layers.{i}.{name}" for i in range(2) for name in (
        "attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2",
    )),
]  # fmt: skip
"""The linear layers of a tiny ViT in the order they run."""


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@cache
def experts() -> dict[str, nn.Module]:
    return dict(zip("ab", tiny.pair("vit"), strict=True))


DATA = {"a": images(9), "b": images(7, 1)}


def rows_of(model: nn.Module, path: str, x: Tensor) -> Tensor:
    seen = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(pixel_values=x.double())
    handle.remove()
    rows = seen[0]
    return (nn.functional.unfold(rows, 4, stride=4).mT if rows.dim() == 4 else rows).flatten(0, -2)


def test_regmean_pp_reads_what_the_merged_layers_before_compute():
    """The whole rule, written down: one layer after another, every time with a new forward pass."""
    own = [copy.deepcopy(model.vit).double() for model in experts().values()]
    merged = copy.deepcopy(own[0])
    with torch.no_grad():
        for tensors in zip(*(model.parameters() for model in (merged, *own)), strict=True):
            tensors[0].copy_(sum(tensors[1:]) / 2)
        for path in ORDER:
            weights = [model.get_submodule(path).weight.flatten(1) for model in own]
            grams = []
            for x in DATA.values():
                rows = rows_of(merged, path, x)
                gram = rows.T @ rows / len(rows)
                grams.append(0.9 * gram + 0.1 * torch.diag(gram.diagonal()))
            solved = sum(w @ g for w, g in zip(weights, grams, strict=True)) @ torch.linalg.inv(sum(grams))
            module = merged.get_submodule(path)
            module.weight.copy_(solved.reshape(module.weight.shape))
    planned = plan(experts(), method="identity", combine="regmean++")
    found = combined_trunk(planned, {}, Calibration(DATA, batch_size=4))
    for name, tensor in merged.named_parameters():
        torch.testing.assert_close(found[f"vit.{name}"].double(), tensor, rtol=1e-3, atol=1e-5, msg=name)


def test_featcal_moves_the_merged_features_towards_the_experts():
    """And its result differs from the merge that it starts from in layers, not in tables."""
    base = tiny.build("vit", 7, num_labels=3)
    settings = {"method": "identity", "base": base}
    plain = merge(experts(), combine="task-arithmetic", **settings)
    found = merge(experts(), DATA, combine="featcal", combine_options={"ridge": 1e-3, "reach": 1.0}, **settings)
    for name, tensor in model_tensors(found.trunk).items():
        same = torch.equal(tensor, model_tensors(plain.trunk)[name])
        assert same == (name.endswith(("cls_token", "position_embeddings"))), name
    for task, x in DATA.items():
        with torch.no_grad():
            expected = experts()[task](pixel_values=x).logits
            off = [(model(pixel_values=x, task=task).logits - expected).norm() for model in (found, plain)]
        assert off[0] < off[1]


@pytest.mark.parametrize(("rule", "options"), [("regmean++", {}), ("featcal", {"after": "cart", "reach": 1.0})])
def test_copies_of_one_expert_are_a_fixed_point(rule: str, options: dict):
    model = experts()["a"]
    given = {} if rule == "regmean++" else {"base": tiny.build("vit", 7, num_labels=3)}
    merged = merge({"a": model, "b": model}, DATA, method="identity", combine=rule, combine_options=options, **given)
    for name, tensor in model_tensors(merged.trunk).items():
        torch.testing.assert_close(tensor, model_tensors(model)[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", ["regmean", "regmean++"])
@pytest.mark.parametrize("name", ["resnet-basic", "roberta-sequence"])
def test_other_families_and_padded_texts_are_merged(name: str, rule: str):
    """With an alignment before it; texts with padding count as those without."""
    pair = dict(zip("ab", tiny.pair(name), strict=True))
    generator, long = torch.Generator().manual_seed(0), {}
    for task in "ab":
        if name.startswith("roberta"):
            ids = torch.randint(3, 50, (8, 12), generator=generator)
            mask = torch.ones_like(ids)
            mask[:, 9:] = 0
            long[task] = {"input_ids": torch.where(mask > 0, ids, 1), "attention_mask": mask}
        else:
            long[task] = {"pixel_values": torch.randn(8, 3, 9, 9, generator=generator)}
    short = {task: {key: value[:, :9] for key, value in one.items()} for task, one in long.items()}
    settings = {"method": "weights", "combine": rule, "corrections": ()}
    found, expected = (merge(pair, data, **settings) for data in (long, short))
    for tensor, other in zip(found.trunk.state_dict().values(), expected.trunk.state_dict().values(), strict=True):
        torch.testing.assert_close(tensor, other, rtol=1e-3, atol=1e-4)
    plain = merge(pair, method="weights", corrections=())
    assert any(not torch.equal(x, y) for x, y in zip(found.trunk.parameters(), plain.trunk.parameters(), strict=True))


def test_a_kernel_of_one_channel_is_what_the_first_merge_made_of_it():
    """It reads no space, as a depthwise one does not: it is no matrix for any rule."""
    grey = {task: tiny.build("vit", seed, num_channels=1) for seed, task in enumerate("ab")}
    data = {"a": images(4)[:, :1], "b": images(4, 1)[:, :1]}
    settings = {"method": "identity", "base": tiny.build("vit", 7, num_channels=1)}
    found = merge(grey, data, combine="featcal", combine_options={"after": "ties"}, **settings)
    plain = merge(grey, combine="ties", **settings)
    name = "vit.embeddings.patch_embeddings.projection.weight"
    assert torch.equal(found.trunk.get_parameter(name), plain.trunk.get_parameter(name))
    name = "vit.layers.0.mlp.fc1.weight"
    assert not torch.equal(found.trunk.get_parameter(name), plain.trunk.get_parameter(name))


def test_it_says_that_it_needs_data():
    with pytest.raises(DataError, match=r"combine='regmean\+\+' merges layers on what the models compute"):
        merge(experts(), method="identity", combine="regmean++")
