"""The settings of the refit, with the defaults that `benchmarks/` chose on validation data."""

from __future__ import annotations

from dataclasses import dataclass

from hf_zipit.errors import RecipeError


@dataclass(frozen=True, kw_only=True)
class RefitConfig:
    """How modules are regressed on the experts' features.

    Attributes:
        own_task_weight: w, the weight of a task's own expert in the target on that task's samples; the others
            share 1 - w.
            From 1/T (all experts on all samples, for experts that are useful on each other's data) to 1.
        readout_weight: how often the positions that the head reads (a class token, masked tokens) count.
        ridge: lambda, the penalty on the distance from the combined weights, relative to the mean of the Gram
            matrix's diagonal.
        rows_per_input: about this many rows (tokens, positions) per input unit enter a Gram matrix; 0 for all.
        split_heads: let every expert's attention heads stay heads of their own, each with 1/T of the width, in layers
            where that is nearer to the experts than pairing them; the model stays as large and as fast.
        micro_batch: samples that go through a module at once.
        memory_gb: activations beyond this go to temporary files.
        joint_heads: make the tasks' logits comparable: every head's logits are raised on samples of its own task and
            lowered on the others', all by the same amount, so that the order within a task stays as it is.
    """

    own_task_weight: float = 0.55
    readout_weight: float = 30.0
    ridge: float = 1e-4
    rows_per_input: int = 32
    split_heads: bool = True
    micro_batch: int = 64
    memory_gb: float = 4.0
    joint_heads: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.own_task_weight <= 1:
            raise RecipeError(f"refit's own_task_weight is {self.own_task_weight}; it must be above 0 and at most 1")
        for name in ("readout_weight", "ridge", "memory_gb"):
            if not getattr(self, name) > 0:
                raise RecipeError(f"refit's {name} is {getattr(self, name)}; it must be above 0")
        if self.micro_batch < 1 or self.rows_per_input < 0:
            raise RecipeError("refit's micro_batch must be at least 1 and rows_per_input at least 0")
