"""A trace is made once for similar models, and never taken for that of others."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor
from transformers.models.vit.modeling_vit import ViTMLP

from hf_zipit.refit.program import forward_pass
from hf_zipit.symmetry import MergeSpec
from hf_zipit.symmetry import memory as memories
from hf_zipit.symmetry.memory import Memory, trace_key

from .. import tiny
from ..test_invariants import calibration


def test_a_trace_is_made_once_for_similar_models():
    one, other = tiny.build("vit", 0), tiny.build("vit", 1)
    assert MergeSpec.from_model(one) is MergeSpec.from_model(other)
    fewer_heads = tiny.build("vit", num_attention_heads=2)  # all tensors have the same sizes
    assert MergeSpec.from_model(fewer_heads) is not MergeSpec.from_model(one)
    assert MergeSpec.from_model(tiny.build("vit-eager")) is not MergeSpec.from_model(one)


def test_a_model_with_a_hook_is_like_no_other():
    hooked = tiny.build("vit")
    hooked.vit.register_forward_pre_hook(lambda module, args: None)
    assert trace_key(hooked) is None


def test_a_module_whose_numbers_were_changed_is_another():
    plain, scaled = tiny.build("vit", 0), tiny.build("vit", 1)
    assert trace_key(plain) == trace_key(scaled) == trace_key(plain.train())
    scaled.vit.layers[0].attention.scaling *= 2
    assert trace_key(scaled) != trace_key(plain)


@pytest.mark.parametrize("value", [2.0, (1, 2), torch.ones(2), torch.relu, "one", None])
def test_what_hangs_on_a_module_counts(value: object):
    plain, other, same = (tiny.build("vit") for _ in range(3))
    for model, hung in ((plain, 3.0), (other, value), (same, value)):
        model.vit.layers[0].mlp.hung = hung
    assert trace_key(same) == trace_key(other) != trace_key(plain)


def test_another_method_of_a_class_counts(monkeypatch: pytest.MonkeyPatch):
    before = trace_key(tiny.build("vit"))
    monkeypatch.setattr(ViTMLP, "of_its_own", lambda self: None, raising=False)
    assert trace_key(tiny.build("vit")) != before


def test_a_class_whose_code_was_replaced_is_another(monkeypatch: pytest.MonkeyPatch):
    before, forward = trace_key(tiny.build("vit")), ViTMLP.forward
    monkeypatch.setattr(ViTMLP, "forward", lambda self, hidden_states: forward(self, hidden_states))
    assert trace_key(tiny.build("vit")) != before


def test_forward_passes_are_known_by_the_shapes_of_their_inputs_and_by_what_they_return():
    one, other = tiny.build("vit", 0), tiny.build("vit", 1)
    inputs = calibration(one)
    made = forward_pass(one, inputs, ("logits",))
    assert forward_pass(other, {name: x + 1 for name, x in inputs.items()}, ("logits",)) is made
    assert forward_pass(one, inputs, None) is not made
    assert forward_pass(tiny.build("vit").bfloat16(), inputs, ("logits",)) is not made
    fewer = {name: x[:3] for name, x in inputs.items()}
    assert forward_pass(one, fewer, ("logits",)) is not made
    doubled = {name: x.double() for name, x in inputs.items()}
    assert forward_pass(other.double(), doubled, ("logits",)) is not made


@pytest.mark.parametrize("name", ["vit", "bert-masked", "resnet-basic", "llama"])
def test_no_weights_are_kept_alive(name: str):
    model = tiny.build(name)
    made = forward_pass(model, calibration(model), None)
    left = [weakref.ref(x) for x in (model, *model.parameters(), *model.buffers())]
    del model
    gc.collect()
    assert made.nodes and not any(x() is not None for x in left)


def test_what_was_asked_for_longest_ago_is_forgotten(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memories, "REMEMBERED", 2)
    memory: Memory[Tensor] = Memory()
    made = {key: memory.get(key, lambda: torch.zeros(1)) for key in "ab"}
    assert memory.get("a", lambda: torch.zeros(1)) is made["a"]
    memory.get("c", lambda: torch.zeros(1))
    assert memory.get("a", lambda: torch.zeros(1)) is made["a"]
    assert memory.get("b", lambda: torch.zeros(1)) is not made["b"]
    assert memory.get(None, lambda: torch.zeros(1)) is not memory.get(None, lambda: torch.zeros(1))
