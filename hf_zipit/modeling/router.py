"""The router: which task every sample is of, for `task="auto"`.

A linear discriminant on what the trunk's first block makes of a sample: the mean and the standard deviation of every
unit over the sample's tokens or positions. It is solved, from unlabelled samples that come with their task
(`hf_zipit.residues.routing`), where Twin-Merging (arXiv 2406.15479) trains one. The forward pass that reads these
features ends behind the block.

State dict: `router.weight` `[tasks, 2 units]`, `router.bias` `[tasks]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ZipItError
from .trunk import feature_inputs, for_features, module_under


class FoundFeatures(Exception):  # noqa: N818 - it is no error: the rest of the forward pass is of no use
    """Ends a forward pass with the features that it was for, `[samples, 2 units]`."""

    def __init__(self, features: Tensor) -> None:
        super().__init__("a router's forward pass ends here")
        self.features = features


class Router(nn.Module):
    """The discriminant: buffers `weight` `[tasks, size]` and `bias` `[tasks]`."""

    def __init__(self, tasks: int, size: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(tasks, size))
        self.register_buffer("bias", torch.zeros(tasks))

    def forward(self, features: Tensor) -> Tensor:
        """The log-odds of every task, but for what all have in common, `[samples, tasks]`."""
        return features.to(self.weight) @ self.weight.T + self.bias

    @torch.no_grad()
    def reset(self) -> None:
        """What no file gave: zero."""
        for buffer in self.buffers():
            buffer.zero_()


def make_router(setting: Mapping[str, Any], trunk: nn.Module, tasks: int) -> Router:
    """The router of `config.router`, with the `module` of the trunk whose output it reads hooked.

    Raises ZipItError where there is no such module.
    """
    module_under(trunk, setting["module"], "router").register_forward_hook(end_with_features)
    return Router(tasks, setting["size"])


def end_with_features(module: nn.Module, args: Any, output: Any) -> None:
    """Forward hook: where this pass is for features only, it ends here."""
    inputs = feature_inputs()
    if inputs is not None:
        found = output[0] if isinstance(output, (tuple, list)) else output
        raise FoundFeatures(features_of(found, inputs.get("attention_mask")))


@torch.no_grad()
def read_features(inputs: Mapping[str, Any], run: Callable[[], Any]) -> Tensor:
    """The features that `run`, a forward pass on these inputs, ends with.

    Raises ZipItError where it never comes to the module that is hooked.
    """
    try:
        with for_features(inputs):
            run()
    except FoundFeatures as found:
        return found.features
    raise ZipItError("The forward pass did not reach the module that the router reads.")


def features_of(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean and standard deviation over positions, `[samples, 2 units]`, float32.

    Args:
        x: `[samples, positions, units]`, or `[samples, units, ...]` of images.
        mask: `[samples, positions]`, 0 where a position is padding.
    """
    x = x.float()
    if x.dim() > 3:
        x = x.flatten(2).transpose(1, 2)
    weights = torch.ones_like(x[..., :1])
    if mask is not None and mask.shape == x.shape[:2]:
        weights = mask[..., None].to(x)
    total = weights.sum(1).clamp_min(1)
    mean = (weights * x).sum(1) / total
    variance = (weights * (x - mean[:, None]).square()).sum(1) / total
    return torch.cat([mean, variance.sqrt()], -1)
