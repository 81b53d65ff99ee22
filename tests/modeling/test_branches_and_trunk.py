"""A merged model computes what its experts compute, runs the trunk once, owns every tensor once; for every family."""

from __future__ import annotations

import copy
import threading
from collections import Counter

import pytest
import torch
from torch import nn

import hf_zipit
from hf_zipit.adapters import example_inputs
from hf_zipit.modeling.joint import joint_embedding, vote
from tests import tiny

from .by_hand import FAMILIES, make_experts, make_inputs, merge_by_hand


def count_calls(modules: dict[str, nn.Module]) -> Counter[str]:
    calls: Counter[str] = Counter()
    for name, module in modules.items():
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    return calls


@torch.no_grad()
def test_one_task_is_its_expert_bit_by_bit(family: str, shared: tuple[str, ...]) -> None:
    experts = make_experts(family, shared)
    merged = merge_by_hand(experts, shared)
    inputs = make_inputs(family)
    for task, expert in experts.items():
        wanted, found = expert(**inputs), merged(**inputs, task=task)
        assert type(found) is type(wanted)
        assert list(found) == list(wanted)
        assert torch.equal(found[0], wanted[0])


@torch.no_grad()
@pytest.mark.parametrize("tasks", [2, 3])
def test_joint_is_the_experts_side_by_side_bit_by_bit(family: str, shared: tuple[str, ...], tasks: int) -> None:
    experts = make_experts(family, shared, tasks)
    merged = merge_by_hand(experts, shared)
    inputs = make_inputs(family)
    outputs = [expert(**inputs) for expert in experts.values()]
    joint = merged(**inputs)
    assert type(joint) is type(outputs[0])
    if family == "clip":
        per_image = torch.stack([output.logits_per_image for output in outputs]).mean(0)
        assert torch.equal(joint.logits_per_image, per_image)
        assert torch.equal(joint.image_embeds, joint_embedding([output.image_embeds for output in outputs]))
    elif family == "bert-lm":
        assert torch.equal(joint.logits, vote([output.logits for output in outputs]))
    elif family == "bert-features":
        for field in ("last_hidden_state", "pooler_output"):
            assert torch.equal(joint[field], torch.cat([output[field] for output in outputs], dim=-1))
    else:
        assert torch.equal(joint.logits, torch.cat([output.logits for output in outputs], dim=-1))


@torch.no_grad()
def test_joint_forward_runs_every_shared_module_once(family: str, shared: tuple[str, ...]) -> None:
    merged = merge_by_hand(make_experts(family, shared), shared)
    below = {path: merged.trunk.get_submodule(path) for path in shared}
    leaves = {
        f"{path}:{name}": leaf
        for path, module in below.items()
        for name, leaf in module.named_modules()
        if isinstance(leaf, nn.Linear | nn.Conv2d | nn.LayerNorm)
    }
    calls = count_calls(leaves)
    once = merged(**make_inputs(family), task=merged.config.tasks[0])
    alone = calls.copy()
    merged(**make_inputs(family))
    assert once is not None
    assert alone.total() > 0 or not shared
    assert calls == Counter({name: 2 * count for name, count in alone.items()})


def test_every_tensor_is_in_the_state_dict_once(family: str, shared: tuple[str, ...]) -> None:
    experts = make_experts(family, shared)
    merged = merge_by_hand(experts, shared)
    tensors = merged.state_dict(keep_vars=True)
    assert len({tensor.data_ptr() for tensor in tensors.values()}) == len(tensors)
    names = list(next(iter(experts.values())).state_dict())
    inside = {name for name in names if any(path == "" or name.startswith(f"{path}.") for path in shared)}
    assert {name.removeprefix("trunk.") for name in tensors if name.startswith("trunk.")} == inside
    for key in merged.branch_names.values():
        own = {name.removeprefix(f"branches.{key}.") for name in tensors if name.startswith(f"branches.{key}.")}
        assert own == set(names) - inside


@torch.no_grad()
def test_a_deep_copy_reads_its_own_trunk(family: str, shared: tuple[str, ...]) -> None:
    merged = merge_by_hand(make_experts(family, shared), shared)
    inputs = make_inputs(family)
    before = merged(**inputs)[0]
    twin = copy.deepcopy(merged)
    for parameter in merged.parameters():
        parameter.zero_()
    assert torch.equal(twin(**inputs)[0], before)
    assert not torch.equal(merged(**inputs)[0], before)


def test_gradients_reach_the_trunk_and_every_branch(family: str, shared: tuple[str, ...]) -> None:
    experts = make_experts(family, shared)
    merged = merge_by_hand(experts, shared).train()
    merged(**make_inputs(family))[0].square().sum().backward()
    for expert in experts.values():
        expert.train()(**make_inputs(family))[0].square().sum().backward()
    first = next(iter(experts.values()))  # all names: tied parameters have several, and untied ones still are reached
    reached = {name for name, value in first.named_parameters(remove_duplicate=False) if value.grad is not None}
    for name, parameter in merged.named_parameters():
        part, _, rest = name.partition(".")
        source = rest if part == "trunk" else rest.partition(".")[2]
        if source == "cls.predictions.bias":  # read through the decoder's bias, to which it is no longer tied
            continue
        assert (parameter.grad is not None) == (source in reached), name


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit", "bert", "resnet"])
def test_inference_mode_gives_the_same(family: str) -> None:
    merged = merge_by_hand(make_experts(family, FAMILIES[family].part), FAMILIES[family].part)
    wanted = merged(**make_inputs(family))[0]
    with torch.inference_mode():
        assert torch.equal(merged(**make_inputs(family))[0], wanted)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    shared = FAMILIES["vit"].part
    merged = merge_by_hand(make_experts("vit", shared), shared).train()
    twin = copy.deepcopy(merged)
    twin.activation_checkpointing_enable()
    for model in (merged, twin):
        model(**make_inputs("vit")).logits.square().sum().backward()
    for (name, one), (_, other) in zip(merged.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


@torch.no_grad()
def test_attention_setting_made_later_reaches_trunk_and_branches() -> None:
    shared = FAMILIES["vit"].part
    merged = merge_by_hand(make_experts("vit", shared), shared)
    merged.set_attn_implementation("eager")
    layers = [module for module in merged.modules() if type(module).__name__ == "ViTAttention"]
    assert len(layers) == 3
    assert {layer.config._attn_implementation for layer in layers} == {"eager"}


@torch.no_grad()
def test_threads_do_not_see_each_others_trunk() -> None:
    shared = FAMILIES["vit"].part
    merged = merge_by_hand(make_experts("vit", shared), shared)
    batches = [make_inputs("vit", seed=seed) for seed in range(8)]
    wanted = [merged(**batch).logits for batch in batches]
    found: dict[int, torch.Tensor] = {}

    @torch.no_grad()
    def work(position: int) -> None:
        found[position] = merged(**batches[position]).logits

    threads = [threading.Thread(target=work, args=(position,)) for position in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[position], logits) for position, logits in enumerate(wanted))


def test_bfloat16_and_train_reach_all_parts() -> None:
    shared = FAMILIES["vit"].part
    entry = {"module": "vit.layers.1", "axis": -1, "units": 32, "size": 32}
    merged = merge_by_hand(make_experts("vit", shared), shared, entries=[entry]).to(torch.bfloat16).train()
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in merged.entries.buffers()} == {torch.int64}
    assert all(module.training for module in merged.modules())
    merged.eval()
    assert not any(module.training for module in merged.modules())
    assert merged(pixel_values=make_inputs("vit")["pixel_values"].bfloat16()).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["vit", "llama"])
@pytest.mark.parametrize("depth", [0.5, 1.0])
@torch.no_grad()
def test_hidden_states_and_attentions_are_those_of_all_blocks(name: str, depth: float):
    expert = tiny.build(name, 0)
    merged = hf_zipit.merge({"a": expert, "b": expert}, method="identity", depth=depth)
    for model in (expert, merged):
        model.set_attn_implementation("eager")
    inputs, plain = example_inputs(expert), merged(**example_inputs(expert), task="a").logits
    asked = {"output_hidden_states": True, "output_attentions": True}
    expected = expert(**inputs, **asked)
    for found in (merged(**inputs, **asked, task="a"), merged.for_task("b")(**inputs, **asked)):
        for field in ("hidden_states", "attentions"):
            assert len(found[field]) == len(expected[field]) > 0
            assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(found[field], expected[field], strict=True))
    joint = merged(**inputs, **asked)
    assert len(joint.hidden_states) == len(expected.hidden_states)
    assert joint.hidden_states[1].shape[-1] == 2 * expected.hidden_states[1].shape[-1]
    assert torch.equal(merged(**inputs, task="a").logits, plain)
