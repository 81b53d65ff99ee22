"""Where the trunk ends: depths, what is on which side, where branches enter, and models that cannot be cut."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from benchmarks.smallest import smallest_model
from hf_zipit.adapters import adapter_for
from hf_zipit.errors import RecipeError, SpecError
from hf_zipit.planning.cut import blocks_in_trunk, cut_model, tower_lengths
from hf_zipit.symmetry import MergeSpec
from hf_zipit.symmetry.proof import model_tensors
from hf_zipit.symmetry.spec import product_key
from tests import tiny
from tests.tiny import REQUIRED, TRUNKS, build

DEPTHS = (0.0, 0.5, 1.0)


@cache
def traced(name):
    model = build(name)
    return model, MergeSpec.from_model(model)


def is_within(name: str, path: str) -> bool:
    return name == path or name.startswith(f"{path}.")


# Depths --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "blocks"), [(0, 0), (0.25, 1), (0.5, 2), (0.6, 2), (0.75, 3), (1, 4), (1.0, 4)])
def test_a_share_counts_blocks(depth, blocks):
    spec = MergeSpec.from_model(build("vit", num_hidden_layers=4))
    assert blocks_in_trunk(spec, depth) == (blocks,)


def test_halves_are_rounded_up():
    _, spec = traced("vit")
    assert [blocks_in_trunk(spec, depth) for depth in (0.2, 0.25, 0.7, 0.75)] == [(0,), (1,), (1,), (2,)]


@pytest.mark.parametrize("name", REQUIRED)
def test_a_block_path_ends_the_trunk_before_it(name):
    _, spec = traced(name)
    for tower, length in enumerate(tower_lengths(spec)):
        paths = [block.path for block in spec.blocks if block.tower == tower]
        assert len(paths) == length
        assert [blocks_in_trunk(spec, path)[tower] for path in paths] == list(range(length))


def test_a_wrong_path_is_answered_with_the_nearest_one():
    _, spec = traced("vit")
    with pytest.raises(RecipeError, match=r"did you mean 'vit\.layers\.1'\?"):
        blocks_in_trunk(spec, "vit.layer.1")
    with pytest.raises(RecipeError, match=r"its blocks are vit\.layers\.0, vit\.layers\.1"):
        blocks_in_trunk(spec, "???")


@pytest.mark.parametrize("depth", [-0.1, 1.1, 2, float("nan"), float("inf"), True, None, [0.5]])
def test_a_depth_outside_its_range_is_refused(depth):
    with pytest.raises(RecipeError, match="a share from 0 to 1 or the path of a block"):
        blocks_in_trunk(traced("vit")[1], depth)


def test_both_towers_of_clip_are_cut():
    model, spec = traced("clip")
    assert tower_lengths(spec) == [2, 2]
    assert [blocks_in_trunk(spec, depth) for depth in (0, 0.5, 1)] == [(0, 0), (1, 1), (2, 2)]
    entries = {entry.target for entry in cut_model(model, spec, 0.5).entries}
    assert entries == {"vision_model.encoder.layers.1", "text_model.encoder.layers.1"}
    projections = {entry.target for entry in cut_model(model, spec, 1).entries}
    assert projections == {"visual_projection", "text_projection"}


# The two sides -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("name", REQUIRED)
def test_every_tensor_is_on_the_side_of_its_block(name, depth):
    model, spec = traced(name)
    cut = cut_model(model, spec, depth)
    assert cut.trunk <= set(model_tensors(model))
    lengths = tower_lengths(spec)
    for tower, count in enumerate(cut.blocks):
        paths = [block.path for block in spec.blocks if block.tower == tower]
        for number, path in enumerate(paths):
            own = {tensor for tensor in model_tensors(model) if is_within(tensor, path)}
            assert own
            assert own <= cut.trunk if number < count else not own & cut.trunk
    heads = {tensor for tensor in model_tensors(model) for head in spec.head if is_within(tensor, head)}
    assert not heads & cut.trunk
    if not any(cut.blocks):
        assert not cut.trunk
    elif list(cut.blocks) == lengths:
        assert cut.trunk == set(model_tensors(model)) - heads
    assert cut.depth == sum(cut.blocks) / sum(lengths)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("name", REQUIRED)
def test_shared_modules_hold_the_trunk_and_nothing_else(name, depth):
    model, spec = traced(name)
    cut = cut_model(model, spec, depth)
    held = [tensor for tensor in model_tensors(model) for path in cut.shared if is_within(tensor, path)]
    assert len(held) == len(set(held))  # no shared module lies in another one
    assert set(held) <= cut.trunk
    # What is left over hangs beside blocks, in modules that also hold a branch: it belongs to no module of the trunk.
    for tensor in cut.trunk - set(held):
        owner = tensor.rpartition(".")[0]
        assert any(is_within(other, owner) or not owner for other in set(model_tensors(model)) - cut.trunk)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("name", REQUIRED)
def test_a_branch_enters_the_trunk_wherever_the_cut_is(name, depth):
    model, spec = traced(name)
    cut = cut_model(model, spec, depth)
    if not any(cut.blocks):
        assert cut.entries == cut.exits == ()
        return
    assert cut.entries or cut.exits
    readouts = {entry.target for entry in cut.entries}
    assert len(readouts) == len(cut.entries)
    for entry in cut.entries:
        model.get_submodule(entry.target)
        assert not any(is_within(tensor, entry.target) for tensor in cut.trunk)
        assert any(spec.movable(space) for space in entry.key)
    for exit_ in cut.exits:
        assert exit_.key == product_key(spec.outputs[exit_.target][exit_.axis])
    for tower, count in enumerate(cut.blocks):
        paths = [block.path for block in spec.blocks if block.tower == tower]
        assert readouts & set(paths) <= set(paths[count : count + 1])
        if count < len(paths):
            assert paths[count] in readouts


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("name", REQUIRED)
def test_entries_hold_what_the_branch_is_given(name, depth):
    """The axis of an entry's first input has as many units as the entry's spaces."""
    model, spec = traced(name)
    cut = cut_model(model, spec, depth)
    seen: dict[str, Tensor] = {}

    def watch(target: str) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.setdefault(target, (*args, *kwargs.values())[0])

        return note

    hooks = [
        model.get_submodule(entry.target).register_forward_pre_hook(watch(entry.target), with_kwargs=True)
        for entry in cut.entries
    ]
    with torch.no_grad():
        model(**adapter_for(model).inputs(model))
    for hook in hooks:
        hook.remove()
    for entry in cut.entries:
        assert seen[entry.target].shape[entry.axis] == spec.size(entry.key)


def test_the_trunk_knows_its_spaces():
    model, spec = traced("vit")
    first, last = cut_model(model, spec, 0.5), cut_model(model, spec, 1)
    assert cut_model(model, spec, 0).spaces(spec) == frozenset()
    assert first.spaces(spec) < last.spaces(spec)
    assert last.spaces(spec) == {space for space in spec.spaces if spec.movable(space)}
    assert not any(space.startswith("vit.layers.1") for space in first.spaces(spec))


# Models that are not chains ------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class Chain(nn.Module):
    """Four blocks; `skip` carries the first block's output past the third, `twice` runs one block at two places."""

    def __init__(self, skip: bool = False, twice: bool = False) -> None:
        super().__init__()
        self.skip = skip
        self.embed, self.scale, self.head = nn.Linear(6, 8), nn.Parameter(torch.ones(8)), nn.Linear(8, 3)
        blocks = [Block() for _ in range(4)]
        self.blocks = nn.ModuleList([blocks[0], blocks[1], blocks[0], blocks[3]] if twice else blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = early = self.blocks[0](self.embed(x) * self.scale)
        x = self.blocks[2](self.blocks[1](x))
        if self.skip:
            x = x + early
        return self.head(self.blocks[3](x))


class Gated(Block):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return super().forward(x) + gate


def chain(**settings) -> tuple[nn.Module, MergeSpec]:
    torch.manual_seed(0)
    model = Chain(**settings)
    return model, MergeSpec.from_model(model, {"x": torch.randn(2, 6)})


def test_a_plain_chain_is_cut_anywhere():
    model, spec = chain()
    for count in range(1, 4):
        (entry,) = cut_model(model, spec, f"blocks.{count}").entries
        assert (entry.target, entry.axis) == (f"blocks.{count}", 1)


def test_a_skip_across_the_cut_is_refused():
    model, spec = chain(skip=True)
    for depth in ("blocks.1", "blocks.2"):
        with pytest.raises(SpecError, match="Chain cannot be cut here: the model itself reads a value of the trunk"):
            cut_model(model, spec, depth)
    assert cut_model(model, spec, "blocks.3").entries  # the skip ends before it
    assert not cut_model(model, spec, 0).trunk


class TwoInputs(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Gated() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        first = x = self.embed(x) * self.scale
        for block in self.blocks:
            x = block(x, first)
        return self.head(x)


def test_a_block_that_reads_two_values_of_the_trunk_is_refused():
    torch.manual_seed(0)
    model = TwoInputs()
    spec = MergeSpec.from_model(model, {"x": torch.randn(2, 6)})
    with pytest.raises(SpecError, match=r"TwoInputs cannot be cut"):
        cut_model(model, spec, "blocks.2")


def test_a_block_under_two_names_can_be_cut_apart():
    """Each side keeps the tensors under the name it runs them by."""
    model, spec = chain(twice=True)
    assert set(spec.axes) == set(model_tensors(model))
    assert spec.axes["blocks.0.up.weight"] == spec.axes["blocks.2.up.weight"]
    trunk = cut_model(model, spec, "blocks.2").trunk
    assert {tensor.split(".")[1] for tensor in trunk if tensor.startswith("blocks")} == {"0", "1"}


def test_a_tensor_used_on_both_sides_is_refused():
    class Reused(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) @ self.head.weight + self.scale

    class Looped(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.blocks[0](self.blocks[1](self.blocks[0](self.embed(x)))))

    for model_class, tensor in ((Reused, "scale"), (Looped, r"blocks\.0\.up\.weight")):
        torch.manual_seed(0)
        model = model_class()
        spec = MergeSpec.from_model(model, {"x": torch.randn(2, 6)})
        with pytest.raises(SpecError, match=f"{tensor} is used both before and after the cut"):
            cut_model(model, spec, "blocks.1")


def test_a_table_that_the_head_reads_as_well_is_the_trunks_and_every_heads_own():
    """BART runs its shared table under three names, of which the last one is the head's."""
    names = ("model.shared.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")
    model, spec = traced("bart")
    trunk = cut_model(model, spec, 1).trunk
    assert trunk >= set(names)
    assert "lm_head.weight" not in trunk


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("T5ForConditionalGeneration", ("lm_head",)),
        ("T5EncoderModel", ()),
        ("BartForConditionalGeneration", ("lm_head", "final_logits_bias")),
        ("SiglipForImageClassification", ("classifier",)),
        ("WhisperForAudioClassification", ("projector", "classifier")),
    ],
)
def test_a_class_that_holds_its_base_models_parts_side_by_side_has_a_head(name, head):
    model = smallest_model(getattr(transformers, name))
    assert adapter_for(model).head(model) == head


def test_shared_layers_of_albert_are_one_block():
    model, spec = traced("albert")
    assert len(spec.blocks) == 1  # its two layers are the same modules
    assert len(cut_model(model, spec, 1).trunk) > 20


@pytest.mark.parametrize("name", tiny.mostly_seldom([*TRUNKS, "clip-vision", "vit-features"], 2))
def test_every_model_is_cut_or_refused_in_one_sentence(name):
    model, spec = traced(name)
    for depth in DEPTHS:
        try:
            cut = cut_model(model, spec, depth)
        except SpecError as error:
            assert 0 < depth < 1
            assert "\n" not in str(error)
            assert "choose another depth" in str(error)
        else:
            assert set(spec.axes) | spec.unused >= cut.trunk
