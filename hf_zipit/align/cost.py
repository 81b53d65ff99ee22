"""What widths cost: how the parameters, or the multiply-accumulates, of a trunk grow with the sizes of its spaces.

Both are sums of products: a tensor has as many elements as the product of its axes, an axis as many units as the
product of its spaces, and a linear map or convolution takes as many multiplications as its weight has elements, times
the positions it is applied at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from torch import Tensor

from hf_zipit.align.aligned import STATISTICS
from hf_zipit.symmetry.spec import MergeSpec, product_key


@dataclass(frozen=True)
class Cost:
    """A sum of terms, each in proportion to the sizes of some spaces.

    Attributes:
        sizes: every space's size in an expert.
        terms: `(cost in an expert, spaces)`; a space that a tensor has on two axes is named twice.
    """

    sizes: Mapping[str, int]
    terms: tuple[tuple[float, tuple[str, ...]], ...]

    def total(self, sizes: Mapping[str, int]) -> float:
        """The cost where some spaces have other sizes."""
        grown = {name: size / self.sizes[name] for name, size in sizes.items()}
        return sum(cost * prod(grown.get(name, 1) for name in spaces) for cost, spaces in self.terms)

    def with_space(self, name: str) -> Cost:
        """The terms that a space has a part in."""
        return Cost(self.sizes, tuple(term for term in self.terms if name in term[1]))

    def per_unit(self, name: str) -> float:
        """What one more unit of a space costs where everything else is as in an expert."""
        return sum(cost * spaces.count(name) for cost, spaces in self.terms) / self.sizes[name]


def parameters(spec: MergeSpec, tensors: Mapping[str, Tensor]) -> Cost:
    """The elements of the trunk's tensors, tied ones once; a BatchNorm's statistics are not counted."""
    terms, counted = [], set()
    for name, tensor in tensors.items():
        memory = (tensor.data_ptr(), tensor.stride(), tensor.shape)
        known = tensor.data_ptr() != 0 and memory in counted  # tensors without memory are all at 0
        if tensor.is_floating_point() and name.rpartition(".")[2] not in STATISTICS and not known:
            counted.add(memory)
            terms.append((float(tensor.numel()), _spaces(spec, name)))
    return Cost({name: space.size for name, space in spec.spaces.items()}, tuple(terms))


def multiplications(spec: MergeSpec, tensors: Mapping[str, Tensor]) -> Cost:
    """The multiply-accumulates of one sample in the trunk's modules.

    A module without weights of its own (attention scores) costs in proportion to the heads in the modules inside it.
    """
    terms = []
    for module, macs in spec.macs.items():
        own = [name for name in tensors if name.rpartition(".")[0] == module]
        inside = [name for name in tensors if name.startswith(f"{module}.")]
        if own:
            weight = max(own, key=lambda name: tensors[name].dim())
            terms.append((macs / spec.samples, _spaces(spec, weight)))
        elif inside:
            spaces = {name for tensor in inside for name in _spaces(spec, tensor)}
            heads = {outer for name in spaces for outer in spec.spaces[name].within}
            terms.append((macs / spec.samples, tuple(sorted(heads))))
    return Cost({name: space.size for name, space in spec.spaces.items()}, tuple(terms))


def _spaces(spec: MergeSpec, tensor: str) -> tuple[str, ...]:
    """The movable spaces on a tensor's axes."""
    labels = spec.axes.get(tensor, ())
    return tuple(name for label in labels for name in product_key(label) if spec.movable(name))
