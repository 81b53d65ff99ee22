"""How far a merged model is from the expert of one task on samples of this task.

Two terms: what the model puts out, and the features that the task's own modules read from the trunk, in the expert's
own units. Distributions over classes or tokens are apart by the Kullback-Leibler divergence; everything else by the
squared error over the expert's variance, which has no unit and is 0 for a perfect copy and 1 for a constant.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_zipit.adapters import adapter_for
from hf_zipit.adapters.auto import forward_names
from hf_zipit.errors import RecipeError
from hf_zipit.modeling import ZipItPreTrainedModel
from hf_zipit.modeling.entries import first_argument
from hf_zipit.planning.plan import Plan
from hf_zipit.refit.answers import classes_last, divergence, entropy_of, kind_of, mean, spread_error
from hf_zipit.refit.positions import Positions
from hf_zipit.steady import same_draws
from hf_zipit.symmetry.spec import fitted
from hf_zipit.symmetry.trace import select_outputs


@dataclass(frozen=True)
class Apart:
    """What was found on some samples.

    Attributes:
        loss: the distance, a scalar with a gradient.
        agreed, asked: answers that are the expert's, of how many; both 0 where the model does not choose.
    """

    loss: Tensor
    agreed: int
    asked: int


class Distance:
    """The distance of one merged model from its experts, `distance(task, inputs)`.

    Args:
        merged: the model.
        planned: the plan of its merge, with the experts in the units that the branches have.
        positions: which positions count, and how much.
        feature_weight: of the features' term against that of the outputs.
    """

    def __init__(
        self, merged: ZipItPreTrainedModel, planned: Plan, positions: Positions, feature_weight: float
    ) -> None:
        self.merged, self.experts, self.positions = merged, planned.folded, positions
        self.feature_weight = feature_weight
        self._paths = list(dict.fromkeys(entry["module"] for entry in merged.config.entries))
        self._fields = adapter_for(planned.model).outputs(planned.model)
        self._exits = [exit_["field"] for exit_ in merged.config.exits]
        cached = "use_cache" in forward_names(planned.model)
        self._switches: dict[str, Any] = {"use_cache": False} if cached else {}

    def __call__(self, task: str, inputs: Mapping[str, Tensor]) -> Apart:
        expert = self.experts[task]
        given = {**fitted(inputs, self.merged), **self._switches}
        with torch.no_grad(), same_draws(), entering(expert, self._paths) as targets:
            wanted = self._outputs(expert(**fitted(inputs, expert), **self._switches))
        with same_draws(), entering(self.merged.branch(task), self._paths) as features:
            found = self._outputs(self.merged(**given, task=task))
        fields = [name for name in wanted if name in found]
        outputs = [(name, found[name], wanted[name]) for name in fields]
        loss = self._loss(outputs, [(features[path], targets[path]) for path in targets], inputs, expert)
        return Apart(loss, *self._agreement(fields, found, wanted, inputs, expert))

    def _loss(
        self,
        outputs: Sequence[tuple[str, Tensor, Tensor]],
        features: Sequence[tuple[Tensor, Tensor]],
        inputs: Mapping[str, Tensor],
        expert: nn.Module,
    ) -> Tensor:
        """Of outputs, by field, and of what the task's own modules read: the model's, then the expert's."""
        loss = sum(self._apart(name, found, wanted, inputs, expert) for name, found, wanted in outputs) / len(outputs)
        if self.feature_weight and features:
            off = [spread_error(found, wanted, self._weights(inputs, wanted)) for found, wanted in features]
            loss = loss + self.feature_weight * sum(off) / len(off)
        return loss

    def _outputs(self, output: Any) -> dict[str, Tensor]:
        """The fields that are compared; features that come from the trunk only in the expert's units."""
        tensors = select_outputs(output, self._fields)
        if self._fields is None and "logits" not in tensors and self._exits:
            tensors = {name: tensor for name, tensor in tensors.items() if name in self._exits}
        return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.dim() > 0}

    def _apart(
        self, name: str, found: Tensor, wanted: Tensor, inputs: Mapping[str, Tensor], expert: nn.Module
    ) -> Tensor:
        kind = kind_of(name, wanted, expert)
        if kind == "values":
            return spread_error(found, wanted, self._weights(inputs, wanted))
        found, wanted = (classes_last(x.float()) for x in (found, wanted))
        weights = self._weights(inputs, wanted)
        return mean(divergence(found, wanted, kind), weights)

    def _agreement(
        self,
        fields: Sequence[str],
        found: Mapping[str, Tensor],
        wanted: Mapping[str, Tensor],
        inputs: Mapping[str, Tensor],
        expert: nn.Module,
    ) -> tuple[int, int]:
        """How often the largest entry is the expert's, and of how many: where the head reads, if that is known."""
        agreed = asked = 0
        for name in fields:
            if kind_of(name, wanted[name], expert) != "choice":
                continue
            same = classes_last(found[name]).argmax(-1) == classes_last(wanted[name]).argmax(-1)
            weights = self._weights(inputs, classes_last(wanted[name]))
            counted = torch.ones_like(same) if weights is None else (weights > 0) & (weights == weights.max())
            agreed, asked = agreed + int((same & counted).sum()), asked + int(counted.sum())
        return agreed, asked

    def _weights(self, inputs: Mapping[str, Tensor], value: Tensor) -> Tensor | None:
        """The weights of positions, `[samples, positions]`, for a value `[samples, positions, units]`."""
        if value.dim() != 3:
            return None
        weights = self.positions.weights(inputs, value.shape[1])
        return None if weights is None else weights.to(value.device)


class Entropy(Distance):
    """How unsure a merged model is of its answers to samples of a task; the experts are asked for `agreed` alone."""

    def _outputs(self, output: Any) -> dict[str, Tensor]:
        """Answers that choose.

        Raises RecipeError where there are none.
        """
        expert = next(iter(self.experts.values()))
        found = {n: x for n, x in super()._outputs(output).items() if kind_of(n, x, expert) != "values"}
        if not found:
            raise RecipeError(
                f"{type(expert).__name__} does not choose between classes or tokens, and has no entropy to be learnt "
                "from; choose another kind of polish, such as 'weights'"
            )
        return found

    def _apart(
        self, name: str, found: Tensor, wanted: Tensor, inputs: Mapping[str, Tensor], expert: nn.Module
    ) -> Tensor:
        found = classes_last(found.float())
        return mean(entropy_of(found, kind_of(name, wanted, expert)), self._weights(inputs, found))


@contextmanager
def entering(model: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """What enters modules of a model while this lasts, by path, behind all hooks that change it."""
    seen: dict[str, Tensor] = {}

    def see(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[path] = args[0] if args else kwargs[first_argument(type(module))]

    handles = [
        model.get_submodule(path).register_forward_pre_hook(partial(see, path), with_kwargs=True) for path in paths
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
