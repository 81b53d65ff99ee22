"""Which spaces of an architecture may be wider in the merged model than in an expert: tried out, before any work.

A merged model has the modules of its source class with tensors of other shapes. Whether such a model runs, and
whether it still computes the right thing, depends on the class: the hidden units of an MLP only meet linear maps and
elementwise functions, so more of them are welcome; a LayerNorm over a residual stream would take its statistics over
both experts' units; a `view(..., head_dim)` does not even run. Nobody can read that off a table of names, so it is
proven, as the spec is: a model in general position is merged with itself, with some units unmerged. Two copies of a
unit that each count half are that unit, so the wide model must compute what the model computes.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_zipit.adapters import adapter_for, example_inputs
from hf_zipit.combine.combine import merge_tensor
from hf_zipit.errors import RecipeError
from hf_zipit.maps.products import merged_index
from hf_zipit.maps.space_map import Alignment, SpaceMap
from hf_zipit.modeling.trunk import resize
from hf_zipit.symmetry.proof import TOLERANCE, model_tensors, perturb, run_with
from hf_zipit.symmetry.spec import MergeSpec, Space, fitted, product_key


def widenable_spaces(
    model: nn.Module, spec: MergeSpec, *, seed: int = 0, inputs: Mapping[str, Tensor] | None = None
) -> frozenset[str]:
    """The movable spaces that may have more merged units than an expert has, all of them at once.

    Args:
        model: an expert; it is not changed. The trial runs in float32 on the CPU, with the model's attention and with
            eager attention: one forward pass each of the example inputs for every kind of space. Of a kind that fails
            as a whole, so does the first space alone as a rule, and then the others are not tried.
        spec: the trunk's spec.
        seed: of the perturbation.
        inputs: example inputs; the adapter's by default.

    Raises:
        RecipeError: there are movable spaces, and none may be wider.
    """
    if not any(map(spec.movable, spec.spaces)):  # an empty trunk
        return frozenset()
    trial = _Trial.of(model, spec, seed, inputs)
    found: list[str] = []
    for kind in _kinds(name for name in spec.spaces if spec.movable(name)):
        if trial.holds([*found, *kind]):
            found += kind
        elif len(kind) > 1 and trial.holds([*found, kind[0]]):
            found.append(kind[0])
            for name in kind[1:]:
                if trial.holds([*found, name]):
                    found.append(name)
    if not found:
        raise RecipeError(f"No layer of {spec.architecture} can be made wider; choose a method of one width.")
    return frozenset(found)


def _kinds(names: Iterable[str]) -> list[list[str]]:
    """Spaces whose names differ in numbers only, as those of the same place in every layer do."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    return list(kinds.values())


@dataclass(frozen=True)
class _Trial:
    """A model in general position, its perturbed `tensors`, and what it computes of the example inputs.

    Its `models` have no weights: as they are, and with eager attention where that is another one. `fields` are the
    outputs that count.
    """

    models: tuple[nn.Module, ...]
    spec: MergeSpec
    tensors: Mapping[str, Tensor]
    inputs: Mapping[str, Tensor]
    fields: tuple[str, ...] | None
    outputs: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module, spec: MergeSpec, seed: int, inputs: Mapping[str, Tensor] | None) -> _Trial:
        adapter = adapter_for(model)
        tensors = perturb(model_tensors(model), torch.Generator().manual_seed(seed))
        empty = without_weights(model)
        inputs = fitted(example_inputs(model) if inputs is None else inputs, nn.Linear(1, 1))
        fields = adapter.outputs(model)
        outputs = run_with(empty, tensors, inputs, fields)
        return cls((empty, *with_eager_attention(empty)), spec, tensors, inputs, fields, outputs)

    def holds(self, names: Collection[str]) -> bool:
        """Whether the model merged with itself, some units of these spaces unmerged, computes the model."""
        maps = {name: self._some_apart(self.spec.spaces[name], names) for name in names}
        try:
            found = self._run(maps)
        except Exception:  # a model's own code may raise anything where a shape is not what it expects
            return False
        return all(self._same(field, outputs[field], maps) for outputs in found for field in self.outputs)

    def _some_apart(self, space: Space, wide: Collection[str]) -> SpaceMap:
        """A third of the units stays unmerged: all of them would leave the statistics of a norm what they are."""
        apart = max(1, space.size // 3)
        sizes = [self.spec.spaces[outer].size for outer in space.within]
        lead = [n + max(1, n // 3) * (outer in wide) for n, outer in zip(sizes, space.within, strict=True)]
        own = torch.arange(space.size)
        other = torch.where(own >= apart, own, own + space.size)
        labels = torch.stack([own, other]).reshape(2, *(1 for _ in lead), -1).expand(2, *lead, -1)
        return SpaceMap(space.size + apart, labels.contiguous())

    def _run(self, maps: Alignment) -> list[dict[str, Tensor]]:
        touched = {
            name: merge_tensor([self.tensors[name]] * 2, labels, maps, self.spec)
            for name, labels in self.spec.axes.items()
            if any(name in maps for label in labels for name in product_key(label))
        }
        shapes = {name: list(tensor.shape) for name, tensor in touched.items()}
        found = []
        for model in self.models:
            wide = copy.deepcopy(model)
            resize(wide, shapes)
            found.append(run_with(wide, {**self.tensors, **touched}, self.inputs, self.fields))
        return found

    def _same(self, field: str, found: Tensor, maps: Alignment) -> bool:
        """Whether both copies read the expected values from an output, which may be in merged units."""
        expected = self.outputs[field]
        for copy_number in range(2):
            own = found
            for axis, label in enumerate(self.spec.outputs[field]):
                if any(name in maps for name in product_key(label)):
                    own = own.index_select(axis, merged_index(product_key(label), maps, self.spec, copy_number))
            if own.shape != expected.shape:
                return False
            if not bool((own - expected).abs().max() <= TOLERANCE * expected.abs().max()):
                return False
        return True


def without_weights(model: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers are on the meta device."""
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, object] = {}
    for tensor in tensors:
        empty = torch.empty_like(tensor, device="meta", requires_grad=False)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if is_parameter else empty
    return copy.deepcopy(model, memo).eval()


def with_eager_attention(model: nn.Module) -> tuple[nn.Module, ...]:
    """A copy with eager attention; none where the model has it already, or has no attention to choose.

    Attention that torch does in one op takes head counts that eager attention does not, and a mask decides at run time
    which of them runs.
    """
    config = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", "eager") in (None, "eager"):
        return ()
    eager = copy.deepcopy(model)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # about parts that have no attention to choose
    try:
        eager.set_attn_implementation("eager")  # type: ignore[operator]
    except (ValueError, NotImplementedError):
        return ()
    finally:
        logging.set_verbosity(verbosity)
    return (eager,)
