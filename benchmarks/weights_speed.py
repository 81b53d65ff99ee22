"""How long weight matching takes for two ViTs, and how much memory on top of them.

    python -m benchmarks.weights_speed [--layers 12] [--width 768] [--noise 0.5] [--independent]

The weights are random. The second model is the first with its units permuted and noise added, so that it can be said
how many units find their partner; or (`--independent`) another draw: the slowest case, for nothing is alike, and the
descent stops late.
"""

from __future__ import annotations

import resource
import time
from typing import Annotated

import torch
import typer
from transformers import ViTConfig, ViTForImageClassification

from hf_zipit.align.method import Network
from hf_zipit.align.methods.weights import match_weights
from hf_zipit.symmetry.group import apply_element, random_element
from hf_zipit.symmetry.proof import model_tensors
from hf_zipit.symmetry.spec import MergeSpec


def main(
    layers: Annotated[int, typer.Option(help="Number of layers.")] = 12,
    width: Annotated[
        int, typer.Option(help="Width of the residual stream; 64 dims a head, four times in the MLP.")
    ] = 768,
    noise: Annotated[float, typer.Option(help="Standard deviation of the noise, as a share of each tensor's.")] = 0.5,
    independent: Annotated[bool, typer.Option(help="Match two independent draws.")] = False,
    sweeps: Annotated[int, typer.Option(help="At most so many sweeps.")] = 100,
) -> None:
    """Time `weights` on two models."""
    config = ViTConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64, intermediate_size=4 * width
    )
    generator = torch.Generator().manual_seed(0)
    model = ViTForImageClassification(config)
    spec = MergeSpec.from_model(model)
    first = {name: _random(tensor, generator) for name, tensor in model_tensors(model).items()}
    element = random_element(spec, generator, permutations_only=True)
    if independent:
        second = {name: _random(tensor, generator) for name, tensor in first.items()}
    else:
        second = {name: x + noise * _random(x, generator) for name, x in apply_element(first, spec, element).items()}
    del model

    before, start, work = _peak(), time.perf_counter(), time.process_time()
    maps = match_weights(Network(spec, 2, weights=[first, second]), sweeps=sweeps)
    seconds, work, more = time.perf_counter() - start, time.process_time() - work, _peak() - before
    right = [bool(found == true) for name in element if not spec.spaces[name].within
             for found, true in zip(maps[name].labels[1], element[name], strict=True)]  # fmt: skip
    threads = torch.get_num_threads()
    typer.echo(f"{layers} layers x {width}, {threads} threads: {seconds:.1f} s ({work:.1f} s of CPU), {more:+.0f} MiB")
    if not independent:
        typer.echo(f"{sum(right)} of {len(right)} units and heads found their partner")


def _random(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return 0.02 * torch.randn(tensor.shape, generator=generator)


def _peak() -> float:
    """The most memory that this process has had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    typer.run(main)
