"""The proof of a merge spec: a randomly transformed model must compute what the model computes.

The model's parameters and buffers are perturbed first, so that nothing holds by accident: zero biases, unit norms,
or weights so small (as a fresh initialisation leaves them) that a softmax or a nonlinearity is almost a linear map.
Then a random element of the inferred symmetry group is applied, both models run, and the outputs are compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from hf_zipit.adapters import adapter_for, example_inputs
from hf_zipit.adapters.signature import packed
from hf_zipit.errors import SpecError
from hf_zipit.steady import forget, same_draws, steady
from hf_zipit.symmetry.group import apply_element, random_element, transform
from hf_zipit.symmetry.spaces import Trace
from hf_zipit.symmetry.trace import select_outputs

TOLERANCE = 1e-5
"""Largest relative difference of the outputs, in float32, at which a spec counts as proven."""

ROUNDING = 1e-3
"""A larger difference is no rounding."""

VECTOR_NOISE = 0.1
"""Noise on biases and norms, relative to their size (absolute for small biases)."""


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name; tied tensors under each of their names."""
    return {
        **{name: tensor.detach() for name, tensor in model.named_parameters(remove_duplicate=False)},
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def perturb(tensors: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Tensors in general position, in float32 on the CPU: matrices with noise that keeps the scale of what they read.

    Tied tensors stay tied, all-positive vectors (variances) stay positive, integers stay what they are.
    """
    done: dict[tuple[int, ...], Tensor] = {}
    out = {}
    for name, tensor in tensors.items():
        memory = (tensor.data_ptr(), *tensor.shape, *tensor.stride())
        if memory not in done:
            done[memory] = _perturbed(tensor.cpu(), generator)
        out[name] = done[memory]
    return out


def _perturbed(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    tensor = tensor.to(torch.float32)
    if bool(tensor.isinf().any()):  # a mask
        return tensor
    noise = torch.randn(tensor.shape, generator=generator)
    if tensor.ndim > 1:
        fan_in = max(1, tensor.shape[1:].numel())
        return tensor + noise / fan_in**0.5
    if tensor.numel() and bool((tensor > 0).all()):
        return tensor * torch.exp(VECTOR_NOISE * noise)
    return tensor + VECTOR_NOISE * tensor.square().mean().sqrt().clamp_min(1.0) * noise


@steady
def prove(
    model: nn.Module,
    spec: Trace,
    *,
    seed: int = 0,
    inputs: Mapping[str, Tensor] | None = None,
) -> float:
    """Relative error of the outputs after a random element of the inferred symmetry group.

    Args:
        model: the model whose spec it is, in any dtype, on any device; it is not changed. The proof runs in float32 on
            the CPU; an error that rounding could be the reason of is looked at in float64.
        spec: its merge spec.
        seed: of the perturbation and of the group element.
        inputs: example inputs; the adapter's by default.

    Returns:
        The largest `max |y' - y| / max |y|` over the output tensors; at most `TOLERANCE` (1e-5) for a sound spec.

    Raises:
        SpecError: if an output is not finite, so that nothing can be said.
    """
    given = inputs or example_inputs(model)
    error = _error(model, spec, seed, given, torch.float32)
    if TOLERANCE < error < ROUNDING:
        with suppress(RuntimeError):  # of a model that computes in one type alone
            error = min(error, _error(model, spec, seed, given, torch.float64))
    return error


def _error(model: nn.Module, spec: Trace, seed: int, inputs: Mapping[str, Tensor], dtype: torch.dtype) -> float:
    """What `prove` returns, computed in one type."""
    before = torch.get_default_dtype()
    generator = torch.Generator().manual_seed(seed)
    tensors = perturb(model_tensors(model), generator)
    tensors |= {norm.weight: torch.ones_like(tensors[norm.weight]) for norm in spec.folds}  # what it is a spec of
    element = random_element(spec, generator)
    fields = adapter_for(model).outputs(model)
    tensors, inputs = _as(dtype, tensors), _as(dtype, inputs)
    try:
        torch.set_default_dtype(dtype)
        expected = run_with(model, tensors, inputs, fields)
        found = run_with(model, apply_element(tensors, spec, element), inputs, fields)
    finally:
        torch.set_default_dtype(before)
    worst = 0.0
    for name, label in spec.outputs.items():
        wanted = transform(expected[name], label, spec, element) if any(label) else expected[name]
        if not bool(torch.isfinite(wanted).all()):
            raise SpecError(f"the output {name} of {type(model).__name__} is not finite; check the weights for NaN")
        error = (found[name] - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12)
        worst = max(worst, float(error))
    return worst


def _as(dtype: torch.dtype, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the CPU, floating-point ones in one type; a switch, such as `use_cache`, as it is."""
    moved: dict[int, Tensor] = {}  # tied tensors stay tied
    for x in tensors.values():
        if isinstance(x, Tensor) and id(x) not in moved:
            moved[id(x)] = x.cpu().to(dtype) if x.is_floating_point() else x.cpu()
    return {name: moved.get(id(x), x) for name, x in tensors.items()}


def run_with(
    model: nn.Module, tensors: Mapping[str, Tensor], inputs: Mapping[str, Tensor], fields: Sequence[str] | None
) -> dict[str, Tensor]:
    """The outputs of a model in eval mode with other tensors; the model itself is left as it was.

    Where the forward pass draws at random (ViT-MAE's mask), it draws the same every time.
    """
    training = [(module, module.training) for module in model.modules()]
    forget(model)
    model.eval()
    try:
        with torch.no_grad(), same_draws():
            out = torch.func.functional_call(model, dict(tensors), (), packed(inputs), tie_weights=False)
        return select_outputs(out, fields)
    finally:
        forget(model)
        for module, mode in training:
            module.training = mode
