"""Mixtures of task vectors in the MLPs of a merge (`hf_zipit.modeling.mixtures`), for trainings of their routers."""

from __future__ import annotations

from torch import nn, randn

from hf_zipit.adapters import adapter_for, example_inputs
from hf_zipit.combine.combine import Trunk, generator_of
from hf_zipit.errors import RecipeError
from hf_zipit.modeling.gates import LINEAR, matrix_of
from hf_zipit.modeling.residue import TaskTensor
from hf_zipit.planning.plan import Plan
from hf_zipit.polish.kind import Finished
from hf_zipit.refit.mlps import find_mlps
from hf_zipit.refit.program import Program
from hf_zipit.refit.solvable import find_sites
from hf_zipit.refit.stage import in_float32, with_fused_attention


def mlps(planned: Plan) -> list[list[str]]:
    """Of every MLP of the trunk its linear layers, in the order they run."""
    model, spec, trunk = in_float32(planned.model), planned.spec, planned.cut.trunk
    fields = adapter_for(planned.model).outputs(planned.model)
    program = Program(with_fused_attention(model), example_inputs(model), fields, trunk)
    found = [
        [site.weight.rpartition(".")[0] for site in (*mlp.writers, mlp.reader)]
        for mlp in find_mlps(program, find_sites(program, trunk, spec.head), spec)
    ]
    return [paths for paths in found if all(isinstance(model.get_submodule(path), LINEAR) for path in paths)]


def check_mixable(kind: str, planned: Plan, *, hidden: int = 0, rank: int = 0) -> None:
    """Raise RecipeError if a model's MLPs cannot be weighed sample by sample; `hidden`, `rank`: as of `add_mixtures`.

    It is asked before any work.
    """
    for option, value in (("hidden", hidden), ("rank", rank)):
        if value < 0:
            raise RecipeError(f"{kind}'s option {option} is {value}; it must be 0 or more.")
    if getattr(planned.model, "can_generate", bool)():
        raise RecipeError(
            f"polish={kind!r} weighs MLPs by the mean over all of a sample's positions, but {planned.architecture} "
            "writes one after the other; choose another kind, such as 'adamerging'"
        )
    if planned.config.residues is not None:
        raise RecipeError(f"polish={kind!r} adds task vectors to MLPs, and residues add them as well; leave one out.")
    if planned.cut.trunk and not mlps(planned):
        raise RecipeError(
            f"polish={kind!r} weighs the MLPs of the trunk, and that of {planned.architecture} has none; choose "
            "another kind, such as 'adamerging'"
        )


def add_mixtures(done: Finished, hidden: int, rank: int) -> dict[str, nn.Parameter]:
    """Give a merge's MLPs task vectors and routers, in place, and return the routers' parameters by name.

    Args:
        hidden: the routers' units; 0 for as many as enter the MLP.
        rank: of the weights' task vectors, 0 for whole ones, in half precision.
    """
    merged, trunk, settings = done.merged, Trunk(done.planned, done.maps), []
    for layers in mlps(done.planned):
        first = merged.trunk.get_submodule(layers[0])
        units = matrix_of(first, first.weight).shape[1]
        settings.append({"layers": layers, "hidden": hidden or units, "rank": rank})
    mixtures = merged.add_mixtures(settings)
    for number, (setting, mixture) in enumerate(zip(settings, mixtures, strict=True)):
        drawn = randn(mixture.down.shape, generator=generator_of(done.planned.config.seed, f"mixtures.{number}"))
        mixture.down.data.copy_(drawn / mixture.down.shape[1] ** 0.5)
        for path, by_task in zip(setting["layers"], mixture.vectors, strict=True):
            for leaf in next(iter(by_task.values())):
                name = f"{path}.{leaf}"
                own, origin = trunk.moved(name)
                assert origin is not None  # `check_polish`
                for task, tensors, tensor in zip(done.planned.tasks, by_task.values(), own, strict=True):
                    vector = TaskTensor(task, name, origin, tensor, origin)
                    kind, size = type(tensors[leaf]), tensors[leaf].size
                    tensors[leaf].load_state_dict(kind.packed(vector, size).state_dict())
    merged.mixtures.to(next(merged.parameters()).device)
    return {f"mixtures.{name}": parameter for name, parameter in merged.mixtures.named_parameters()}
