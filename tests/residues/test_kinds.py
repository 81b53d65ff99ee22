"""What every kind of residue must do, over the registry, and what the papers' kinds compute, from their equations."""

from __future__ import annotations

import copy
import json
import struct
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from hf_zipit import MergeConfig, merge, register_residue
from hf_zipit.errors import RecipeError, ZipItError
from hf_zipit.modeling.residue import Residue, TaskTensor, from_bits
from hf_zipit.modeling.residues import residue_bytes
from hf_zipit.registry import RESIDUES
from tests import tiny


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


IMAGES = draw(6, 3, 16, 16).float()
KINDS = list(RESIDUES)


@cache
def pair() -> dict[str, nn.Module]:
    return dict(zip("ab", tiny.pair("vit"), strict=True))


def fine_tuned(model: nn.Module, seed: int) -> nn.Module:
    """A copy whose weights moved: a few of them far, as fine-tuning does, most of them hardly."""
    moved = copy.deepcopy(model)
    for number, parameter in enumerate(moved.parameters()):
        parameter.data += 0.002 * draw(*parameter.shape, seed=1000 * seed + number).float() ** 3
    return moved


@cache
def world(where: str) -> tuple[dict[str, nn.Module], dict[str, nn.Module] | None, str]:
    """Experts, their bases, and the method that aligns them."""
    first, second = pair().values()
    if where == "different initialisations":
        return pair(), None, "permute"
    if where == "one base":
        experts = {name: fine_tuned(first, seed) for seed, name in enumerate("abc", 1)}
        return experts, dict.fromkeys("abc", first), "identity"
    bases = {"a": first, "b": first, "c": second}
    return {name: fine_tuned(base, seed) for seed, (name, base) in enumerate(bases.items(), 1)}, bases, "weights"


@cache
def merged(where: str, kind: str | None) -> nn.Module:
    experts, bases, method = world(where)
    wanted = bases if kind and RESIDUES.get(kind).needs_origin else None
    data = dict.fromkeys(experts, IMAGES) if method == "permute" else None
    return merge(experts, data, base=wanted, method=method, residues=kind, refit=False, corrections=())


@torch.no_grad()
def off(model: nn.Module, expert: nn.Module, task: str) -> float:
    """How far a task's logits are from its expert's, relative to these."""
    expected = expert(pixel_values=IMAGES).logits
    return float((model(pixel_values=IMAGES, task=task).logits - expected).norm() / expected.norm())


@pytest.mark.parametrize("where", ["different initialisations", "one base", "two bases"])
@pytest.mark.parametrize("kind", KINDS)
def test_tasks_are_nearer_to_their_experts_than_the_trunk_is(kind: str, where: str):
    experts = world(where)[0]
    with_residues, without = (
        sum(off(merged(where, it), expert, task) for task, expert in experts.items()) for it in (kind, None)
    )
    assert with_residues < 0.8 * without


@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_one_expert_give_it_back(kind: str):
    expert = pair()["a"]
    model = merge({"a": expert, "b": copy.deepcopy(expert)}, method="identity", residues=kind)
    for task in "ab":
        assert off(model, expert, task) < 1e-5
    assert model.config.residues == []  # nothing differs, so that nothing is kept


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_computes_the_same_and_its_file_has_the_size_that_is_told(kind: str, tmp_path: Path):
    model = merged("one base", kind)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        for task in ("a", "b", "c", None):
            found, expected = (it(pixel_values=IMAGES, task=task).logits for it in (again, model))
            assert torch.equal(found, expected)
    content = (tmp_path / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    places = {name: at["data_offsets"] for name, at in header.items() if name != "__metadata__"}
    of_residues = sum(end - start for name, (start, end) in places.items() if name.startswith("residues."))
    assert (len(content) - 8 - length - of_residues, of_residues) == residue_bytes(model)
    assert MergeConfig.from_pretrained(tmp_path).residues.kind == kind


@pytest.mark.parametrize("kind", KINDS)
def test_joint_answers_are_the_trunks_and_a_batch_of_several_tasks_is_each_tasks_own(kind: str):
    model = merged("one base", kind)
    with torch.no_grad():
        assert torch.equal(model(pixel_values=IMAGES).logits, merged("one base", None)(pixel_values=IMAGES).logits)
        mixed = model(pixel_values=IMAGES, task=list("aabbaa")).logits
        start = model.config.offsets()["b"]
        own = model(pixel_values=IMAGES[2:4], task="b").logits
        torch.testing.assert_close(mixed[2:4, start : start + own.shape[1]], own, rtol=1e-5, atol=1e-6)
        assert mixed[:2, start:].max() < -1e30
        with pytest.raises(ZipItError, match="2 task names came with a batch of 6 samples"):
            model(pixel_values=IMAGES, task=["a", "b"])


def test_after_task_arithmetic_one_vector_is_shared_whatever_the_scale():
    experts, bases, method = world("one base")
    options = {"combine": "task-arithmetic", "combine_options": {"scale": 0.3}, "base": bases}
    model = merge(experts, method=method, residues="tall", **options)
    assert residue_bytes(model)[1] == residue_bytes(merged("one base", "tall"))[1]
    for task, expert in experts.items():  # the masks are of the task vectors, and the trunk's scale does not matter
        assert off(model, expert, task) == pytest.approx(off(merged("one base", "tall"), expert, task), rel=1e-2)


# The papers' equations.


def task_tensors(scale: float = 0.4) -> list[TaskTensor]:
    """A tensor of three tasks, whose merged one is the base and a part of the sum of the task vectors."""
    base, vectors = draw(9, 7, seed=1), [0.005 * draw(9, 7, seed=2 + t) for t in range(3)]
    merged_one = base + scale * sum(vectors)
    return [TaskTensor(t, "w", merged_one, base + d, base) for t, d in zip("abc", vectors, strict=True)]


def rebuilt(kind: str, tensors: list[TaskTensor], **options: float) -> list[Tensor]:
    shared, residues = RESIDUES.get(kind).pack(tensors, **options)
    return [t.merged + residue.tensor(shared).double() for t, residue in zip(tensors, residues, strict=True)]


@pytest.mark.parametrize("threshold", [0.2, 0.4, 1.0])
def test_tall_masks(threshold: float):
    tensors = task_tensors()
    total = sum(tensor.own - tensor.origin for tensor in tensors)
    for tensor, found in zip(tensors, rebuilt("tall", tensors, threshold=threshold), strict=True):
        vector = tensor.own - tensor.origin
        mask = (vector.abs() >= threshold * (total - vector).abs()).double()
        assert 0 < mask.mean() < 1
        torch.testing.assert_close(found, tensor.origin + mask * total, rtol=0, atol=1e-5)


def test_emr_elects_masks_and_rescales():
    tensors = task_tensors()
    vectors = [tensor.own - tensor.origin for tensor in tensors]
    elected = torch.zeros(9, 7, dtype=torch.float64)
    for i in range(9):
        for j in range(7):
            entries = [float(vector[i, j]) for vector in vectors]
            sign = 1 if sum(entries) > 0 else -1
            elected[i, j] = sign * max(abs(entry) for entry in entries if entry * sign > 0)
    for tensor, vector, found in zip(tensors, vectors, rebuilt("emr", tensors), strict=True):
        mask = (vector * elected > 0).double()
        scale = vector.abs().sum() / (mask * elected).abs().sum()
        torch.testing.assert_close(found, tensor.origin + scale * mask * elected, rtol=0, atol=1e-5)


def test_every_task_starts_at_its_own_base():
    tensors = task_tensors()
    other = draw(9, 7, seed=8)
    moved = [*tensors[:2], TaskTensor("c", "w", tensors[0].merged, other + tensors[2].vector, other)]
    pairs = zip(moved, rebuilt("tall", moved), rebuilt("tall", tensors), tensors, strict=True)
    for there, found, expected, here in pairs:
        torch.testing.assert_close(found - there.origin, expected - here.origin, rtol=0, atol=2e-3)


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_task_switch_is_the_papers_where_the_trunk_is_the_base(share: float):
    tensors = task_tensors(scale=0.0)
    for tensor, found in zip(tensors, rebuilt("t-switch", tensors, share=share), strict=True):
        vector = tensor.own - tensor.origin
        count = round(share * vector.numel())
        least = vector.abs().flatten().sort(descending=True).values[count - 1]
        active = vector.abs() >= least
        scale = vector[active].abs().mean()
        torch.testing.assert_close(found, tensor.origin + scale * active * vector.sign(), rtol=0, atol=1e-5)


def test_a_mask_is_a_bit_for_every_weight():
    _, residues = RESIDUES.get("emr").pack(task_tensors())
    assert residues[0].bits.shape == (8,)  # 63 weights
    assert from_bits(residues[0].bits, (9, 7)).shape == (9, 7)


@pytest.mark.parametrize(
    ("residues", "message"),
    [
        ({"kind": "tall", "options": {"threshold": 0.0}}, "tall's threshold is 0.0; it must be above 0"),
        ({"kind": "t-switch", "options": {"share": 1.5}}, "t-switch's share is 1.5; it must be above 0 and at most 1"),
        ({"kind": "emr", "options": {"share": 0.5}}, "'emr' has no option 'share'; it takes none"),
        ({"kind": "emr", "size": 1.2}, "residues of kind 'emr' are as large as their masks; leave size=1.2 out"),
        ("talls", "There is no kind of residue named 'talls'; did you mean 'tall'"),
    ],
)
def test_settings_that_do_not_fit_a_kind_are_told(residues: object, message: str):
    with pytest.raises(RecipeError, match=message):
        MergeConfig(residues=residues)


def test_a_base_is_read_by_kinds_that_are_of_task_vectors():
    experts, bases, method = world("one base")
    with pytest.raises(RecipeError, match="reads no base"):
        merge(experts, base=bases, method=method, residues="signs")


def test_a_kind_of_ones_own_is_one_class(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(RESIDUES, "_entries", dict(RESIDUES._entries))

    @register_residue("mean")
    class Mean(Residue):
        """The residue's mean."""

        def __init__(self, shape: tuple[int, ...], size: int = 1) -> None:
            super().__init__(shape, size)
            self.register_buffer("mean", torch.zeros(()))

        def tensor(self, shared: object = None) -> Tensor:
            return self.mean.expand(self.shape)

        @classmethod
        def pack(cls, tensors: list[TaskTensor]) -> tuple[None, list[Residue]]:
            found = [cls(tensor.merged.shape) for tensor in tensors]
            for residue, tensor in zip(found, tensors, strict=True):
                residue.mean.fill_(tensor.residue.mean())
            return None, found

    model = merge(pair(), method="identity", residues="mean")
    assert {setting["kind"] for setting in model.config.residues} == {"mean", "dense"}
