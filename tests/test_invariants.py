"""What must hold for every model class and every registered method, on tiny random models.

The classes come from `tiny.py`, the methods from the registry: whoever adds one finds it tested here. A method that
looks at nothing (`needs` is empty) cannot find out that a model's units were reordered; of it only the rest is asked.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
import transformers.modeling_utils
from torch import Tensor, nn
from transformers import PreTrainedModel

import hf_zipit.planning.plan
from hf_zipit import merge, plan
from hf_zipit.adapters import adapter_for
from hf_zipit.errors import OutputError, SpecError
from hf_zipit.planning.plan import check_coverage
from hf_zipit.registry import METHODS
from hf_zipit.symmetry import MergeSpec
from hf_zipit.symmetry.group import apply_element, random_element
from hf_zipit.symmetry.proof import model_tensors, perturb
from hf_zipit.symmetry.trace import select_outputs

from . import tiny

FINDING = [name for name in METHODS.names() if METHODS.get(name).needs]
"""Methods that look at something, and so must find reordered units."""

EVERY_KIND = ["resnet-bottleneck", "clip", "vit", "bert-masked", "bert-sequence", "bert"]
"""One class for every kind of output and block, in an order that pairs none with a method that is slow for it."""

FUSED = ["gpt2", "gpt-neox", "phi3"]
"""Classes whose queries, keys and values are pieces of one projection: its axis is their direct sum."""

SAMPLES = 24

each_class = pytest.mark.parametrize("name", tiny.REQUIRED)
each_kind = pytest.mark.parametrize("name", EVERY_KIND)

TWO_KINDS = [
    (method, EVERY_KIND[(i + more) % len(EVERY_KIND)]) for i, method in enumerate(METHODS.names()) for more in (0, 3)
]
"""Every method and every kind, in a third of all pairs."""

each_method_on_two_kinds = pytest.mark.parametrize(("method", "name"), TWO_KINDS)


@pytest.fixture(autouse=True)
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The spec depends on class and configuration only, so that one trace of each serves all tests."""
    monkeypatch.setattr(hf_zipit.planning.plan, "MergeSpec", TracedOnce)


class TracedOnce:
    specs: dict[str, MergeSpec] = {}  # noqa: RUF012  # shared on purpose

    @classmethod
    def from_model(cls, model: PreTrainedModel, folding: bool = False) -> MergeSpec:
        key = f"{folding} {type(model).__name__} {model.config.to_json_string(use_diff=False)}"
        if key not in cls.specs:
            cls.specs[key] = MergeSpec.from_model(model, folding=folding)
        return cls.specs[key]


@dataclass(frozen=True)
class Case:
    """A model in general position, two reordered copies of it, and unlabelled inputs."""

    model: PreTrainedModel
    moved: PreTrainedModel
    moved_again: PreTrainedModel
    inputs: dict[str, Tensor]


@cache
def case(name: str) -> Case:
    generator = torch.Generator().manual_seed(1)
    model = in_general_position(tiny.build(name), generator)
    spec = TracedOnce.from_model(model)
    moved = [
        with_tensors(model, apply_element(model_tensors(model), spec, random_element(spec, generator, True)))
        for _ in range(2)
    ]
    return Case(model, *moved, calibration(model))


@cache
def experts(name: str, count: int = 2) -> tuple[PreTrainedModel, ...]:
    """Models of different initialisation and, where they are classifiers, of different numbers of labels."""
    generator = torch.Generator().manual_seed(2)
    models = tiny.pair(name, seeds=range(count), labels=range(3, 3 + count))
    return tuple(awake(in_general_position(model, generator)) for model in models)


def in_general_position(model: PreTrainedModel, generator: torch.Generator) -> PreTrainedModel:
    """Fresh models have zero biases and unit norms, by which units cannot be told apart.

    Buffers that no file holds (rotary frequencies) stay what the configuration makes them.
    """
    saved, tensors = model.state_dict().keys(), model_tensors(model)
    perturbed = perturb(tensors, generator)
    return with_tensors(model, {name: perturbed[name] if name in saved else tensors[name] for name in tensors})


@torch.no_grad()
def awake(model: PreTrainedModel) -> PreTrainedModel:
    """BatchNorm knows what it normalises, as in a trained model, so that no unit is dead.

    A dead unit resembles nothing: which live one it joins is a tie that the order of the experts may decide.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    if norms:
        model(**calibration(model))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval()
        norm.momentum = momentum
    return model


def with_tensors(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> PreTrainedModel:
    made = copy.deepcopy(model).eval()
    with torch.no_grad():
        for name, tensor in model_tensors(made).items():
            tensor.copy_(tensors[name])
    return made


def calibration(model: PreTrainedModel) -> dict[str, Tensor]:
    """More of the adapter's own example inputs."""
    generator = torch.Generator().manual_seed(3)
    config = getattr(model.config, "text_config", None) or model.config
    inputs: dict[str, Tensor] = {}
    for name, example in adapter_for(model).inputs(model).items():
        if not isinstance(example, Tensor):
            continue
        shape = (SAMPLES, *example.shape[1:])
        if example.is_floating_point():
            inputs[name] = torch.randn(shape, generator=generator)
        elif name == "input_ids":
            inputs[name] = torch.randint(3, config.vocab_size, shape, generator=generator)
            inputs[name][:, -1] = example[0, -1]  # CLIP pools the token that ends a text
        else:
            inputs[name] = example[:1].expand(shape)
    return inputs


@torch.no_grad()
def outputs(model: nn.Module, inputs: Mapping[str, Tensor], like: PreTrainedModel, **kwargs: str) -> dict[str, Tensor]:
    few = {name: tensor[:4] for name, tensor in inputs.items()}
    return select_outputs(model(**few, **kwargs), adapter_for(like).outputs(like))


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for field, tensor in expected.items():
        assert found[field].shape == tensor.shape, field
        error = (found[field] - tensor).abs().max() / tensor.abs().max()
        assert error <= tolerance, f"{field}: {error:.1e}"


def assert_bit_identical(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def merged(models: Sequence[PreTrainedModel], inputs: Mapping[str, Tensor], **settings: object) -> PreTrainedModel:
    return merge(dict(zip("abc", models, strict=False)), dict(inputs), **{"method": "zip", **settings})


def assert_computes_its_experts(
    result: PreTrainedModel, models: Sequence[PreTrainedModel], inputs: Mapping[str, Tensor]
) -> None:
    """For reordered copies of one model, whose logits are the same; features come in each expert's own order."""
    for task, model in zip("abc", models, strict=False):
        assert_same(outputs(result, inputs, model, task=task), outputs(model, inputs, model), 1e-4)


# 1. A model merged with itself, or with a reordered copy of itself, is that model.


@pytest.mark.parametrize(
    ("method", "name"),
    [
        *TWO_KINDS,
        *tiny.mostly_seldom((("identity", name) for name in tiny.REQUIRED if ("identity", name) not in TWO_KINDS), 2),
    ],
)
def test_model_with_itself(name: str, method: str):
    it = case(name)
    result = merged((it.model, it.model), it.inputs, method=method)
    for task in "ab":
        assert_same(outputs(result, it.inputs, it.model, task=task), outputs(it.model, it.inputs, it.model), 1e-5)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *tiny.mostly_seldom(product([*EVERY_KIND, *FUSED], FINDING)),
        *tiny.mostly_seldom(product([name for name in tiny.REQUIRED if name not in EVERY_KIND], ["zip", "weights"])),
    ],
)
def test_model_with_reordered_copy(name: str, method: str):
    it = case(name)
    result = merged((it.model, it.moved), it.inputs, method=method)
    assert_computes_its_experts(result, (it.model, it.moved), it.inputs)


@each_class
def test_reordered_copy_is_lost_by_averaging(name: str):
    """Without this, the test above could hold by accident."""
    it = case(name)
    result = merged((it.model, it.moved), it.inputs, method="identity")
    with pytest.raises(AssertionError):
        assert_same(outputs(result, it.inputs, it.model, task="a"), outputs(it.model, it.inputs, it.model), 1e-2)


@each_method_on_two_kinds
def test_model_with_two_reordered_copies(name: str, method: str):
    it = case(name)
    models = (it.moved, it.model, it.moved_again) if method in FINDING else (it.model,) * 3
    assert_computes_its_experts(merged(models, it.inputs, method=method), models, it.inputs)


@each_class
@pytest.mark.parametrize("depth", [0.5, "last block"])
def test_reordered_copy_at_every_cut(name: str, depth: float | str):
    it = case(name)
    if depth == "last block":
        depth = TracedOnce.from_model(it.model).blocks[-1].path
    result = merged((it.model, it.moved), it.inputs, depth=depth)
    assert 0 < result.config.depth < 1
    assert result.config.cut
    assert_computes_its_experts(result, (it.model, it.moved), it.inputs)


# 2. Depth 0 is the experts side by side, and their order only orders the tasks.


@each_class
def test_depth_zero_is_the_experts(name: str):
    models = experts(name)
    inputs = calibration(models[0])
    result = merged(models, inputs, depth=0)
    for task, model in zip("ab", models, strict=True):
        assert_same(outputs(result, inputs, model, task=task), outputs(model, inputs, model), 1e-6)
    if tiny.is_classifier(name):
        side_by_side = torch.cat([outputs(model, inputs, model)["logits"] for model in models], -1)
        assert_same(outputs(result, inputs, models[0]), {"logits": side_by_side}, 1e-6)


@pytest.mark.parametrize(
    ("method", "name", "count", "depth"),
    tiny.mostly_seldom(((*pair, *((2, 1.0), (3, 0.5))[i % 2]) for i, pair in enumerate(TWO_KINDS)), 2),
)
def test_order_of_experts(name: str, method: str, count: int, depth: float):
    models = experts(name, count)
    inputs = calibration(models[0])
    there = merge(dict(zip("abc", models, strict=False)), inputs, method=method, depth=depth)
    back = merge(dict(reversed(list(zip("abc", models, strict=False)))), inputs, method=method, depth=depth)
    assert back.config.tasks == there.config.tasks[::-1]
    for task, model in zip("abc", models, strict=False):
        assert_same(outputs(back, inputs, model, task=task), outputs(there, inputs, model, task=task), 1e-4)


# 3. Every tensor is in the trunk or in every branch; nothing is dropped, and nothing is merged without a rule.


@pytest.mark.parametrize(
    ("name", "depth"), [*tiny.mostly_seldom(((name, 0.5) for name in tiny.REQUIRED), 2), *product(EVERY_KIND, [0, 1])]
)
def test_every_tensor_is_somewhere(name: str, depth: float):
    models = experts(name)
    cut = plan(dict(zip("ab", models, strict=True)), depth=depth).cut
    result = merged(models, calibration(models[0]), depth=depth)
    trunk = model_tensors(result.trunk)
    assert set(trunk) <= cut.trunk
    for task, model in zip("ab", models, strict=True):
        own = model_tensors(model)
        branch = model_tensors(result.branch(task))
        assert trunk.keys() | branch.keys() == own.keys()
        assert not trunk.keys() & branch.keys()
        assert_bit_identical(
            {n: t for n, t in branch.items() if n not in cut.trunk},
            {n: t for n, t in own.items() if n not in cut.trunk},
        )


@each_class
def test_tensor_without_a_rule_is_named(name: str):
    planned = plan({"a": case(name).model, "b": case(name).moved})
    check_coverage(planned.spec, planned.cut)
    lost = sorted(planned.cut.trunk & planned.spec.axes.keys())[0]
    axes = {tensor: labels for tensor, labels in planned.spec.axes.items() if tensor != lost}
    with pytest.raises(SpecError, match=lost):
        check_coverage(replace(planned.spec, axes=axes), planned.cut)


def test_counts_cover_all_parameters():
    first, second = experts("vit")
    planned = plan({"a": first, "b": second}, method="identity", depth=0.5)
    total = sum(p.numel() for model in (first, second) for p in model.parameters())
    assert planned.parameters["experts"] == total
    assert planned.parameters["merged"] == total - planned.parameters["trunk"]
    assert sum(planned.coverage.values()) == planned.parameters["trunk"]
    json.dumps(planned.to_dict())


# 4. What is saved and loaded is the same, and so is what is made twice.


@each_class
def test_saved_and_loaded(name: str, tmp_path: Path):
    models = experts(name)
    inputs = calibration(models[0])
    result = merged(models, inputs, depth=0.5)
    result.save_pretrained(tmp_path / "merged")
    loaded, info = type(result).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values()), info
    assert_bit_identical(dict(loaded.state_dict()), dict(result.state_dict()))
    assert loaded.config.method == json.loads(json.dumps(result.config.method))
    for task, model in zip("ab", models, strict=True):
        assert_bit_identical(outputs(loaded, inputs, model, task=task), outputs(result, inputs, model, task=task))
    assert_bit_identical(outputs(loaded, inputs, models[0]), outputs(result, inputs, models[0]))


@pytest.mark.parametrize(("method", "name"), TWO_KINDS[::2])
def test_made_twice(name: str, method: str):
    models = experts(name)
    inputs = calibration(models[0])
    once, twice = (merged(models, inputs, method=method, row_fraction=0.5) for _ in range(2))
    assert_bit_identical(dict(twice.state_dict()), dict(once.state_dict()))


@each_kind
def test_experts_are_left_alone(name: str):
    models = experts(name)
    before = [copy.deepcopy(model) for model in models]
    models[0].train()
    merged(models, calibration(models[0]))
    assert models[0].training
    models[0].eval()
    for model, old in zip(models, before, strict=True):
        assert_bit_identical(model_tensors(model), model_tensors(old))
        assert model.config.to_dict() == old.config.to_dict()
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# 5. Nothing is written over a good result until the new one is complete.


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("no")])
def test_interrupted_saving_leaves_the_old_model(
    fault: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    models = experts("vit")
    inputs = calibration(models[0])
    old, new = (merged(models, inputs, depth=depth) for depth in (1.0, 0.5))
    old.save_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(tensors: Mapping[str, Tensor], path: str, **kwargs: object) -> None:
        Path(path).write_bytes(b"half")
        raise fault

    with monkeypatch.context() as patched:
        patched.setattr(transformers.modeling_utils, "safe_save_file", fail)
        with pytest.raises(OutputError if isinstance(fault, OSError) else type(fault)) as raised:
            new.save_pretrained(tmp_path)
    assert "\n" not in str(raised.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    new.save_pretrained(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert_bit_identical(dict(type(new).from_pretrained(tmp_path).state_dict()), dict(new.state_dict()))


def test_old_shards_do_not_outlive_their_model(tmp_path: Path):
    models = experts("vit")
    old, new = (merged(models, calibration(models[0]), depth=depth) for depth in (1.0, 0.5))
    for sharded in ({}, {"max_shard_size": "50KB"}, {}):
        for model in (old, new):
            model.save_pretrained(tmp_path, **sharded)
            assert_bit_identical(dict(type(model).from_pretrained(tmp_path).state_dict()), dict(model.state_dict()))
