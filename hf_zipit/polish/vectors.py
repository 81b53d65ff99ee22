"""Task vectors of a merge in merged units, and the trunk as the merged one plus multiples of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from hf_zipit.combine.combine import Trunk
from hf_zipit.combine.rules.ties import elected
from hf_zipit.polish.kind import Finished
from hf_zipit.registry import RULES


class Trunks:
    """The merged trunk's parameters, and what every expert learnt beyond the origin.

    Attributes:
        parameters: by name those of the trunk that rules combine; `start`: their values in the merge.
        vectors: by name one float32 tensor for each expert. Of a merge by TIES those that were elected.
        origins: by name where the task vectors start from.
    """

    def __init__(self, done: Finished) -> None:
        planned = done.planned
        trunk = Trunk(planned, done.maps)
        own = dict(done.merged.trunk.named_parameters())
        self.parameters: dict[str, nn.Parameter] = {name: own[name] for name in sorted(trunk.trained & own.keys())}
        self.start = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        choose: Callable[[Sequence[Tensor]], Sequence[Tensor]] = list
        if planned.config.combine == "ties":
            limits = RULES.get("ties").survey_of(trunk, planned.config.combine_options)
            choose = lambda vectors: elected(vectors, limits)  # noqa: E731
        self.vectors: dict[str, list[Tensor]] = {}
        self.origins: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            moved, origin = trunk.moved(name)
            assert origin is not None  # `check_polish`
            self.vectors[name] = [vector.to(parameter) for vector in choose([x - origin for x in moved])]
            self.origins[name] = origin.to(parameter)

    @torch.no_grad()
    def put(self, added: Mapping[str, Tensor]) -> None:
        """The trunk becomes the merged one and what is added to it."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.start[name] + added[name])


class Coefficients:
    """How much more, or less, of every task vector counts than in the merge; zero as they are made.

    Attributes:
        changes: `[tensors, T]`, or `[1, T]` where they are not layerwise.
    """

    def __init__(self, done: Finished, layerwise: bool) -> None:
        self.trunks = Trunks(done)
        rows, tasks = len(self.trunks.parameters) if layerwise else 1, len(done.planned.tasks)
        device = next(done.merged.parameters()).device
        self.changes = nn.Parameter(torch.zeros(rows, tasks, device=device))

    @property
    def through(self) -> list[nn.Parameter]:
        return list(self.trunks.parameters.values())

    def put(self, step: int | None) -> None:
        rows = self.changes.detach().expand(len(self.trunks.parameters), -1)
        self.trunks.put(
            {
                name: sum(change * vector for change, vector in zip(row, self.trunks.vectors[name], strict=True))
                for name, row in zip(self.trunks.parameters, rows, strict=True)
            }
        )

    def pull(self) -> None:
        found = torch.zeros_like(self.changes)
        for number, (name, parameter) in enumerate(self.trunks.parameters.items()):
            if parameter.grad is not None:
                own = torch.stack([(parameter.grad * vector).sum() for vector in self.trunks.vectors[name]])
                found[number if len(found) > 1 else 0] += own
                parameter.grad = None
        self.changes.grad = found
