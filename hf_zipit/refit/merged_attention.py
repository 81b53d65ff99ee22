"""What an attention layer of the merged model computes with some queries and keys, before the walk gets there."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, Sequence
from itertools import zip_longest

import torch
from torch import Tensor, fx
from torch.nn import functional

from hf_zipit.refit.attention import Attention, Heads, bias_of, differs_by_head
from hf_zipit.refit.fit import Fit
from hf_zipit.refit.values import MERGED
from hf_zipit.symmetry.ops import shape_of

Block = tuple[Tensor, ...]
"""Queries and keys of some heads as wide as an expert's, `[heads * head_dim, n]`, and what else `Attention.asked` has;
a bias that matters is a column.
"""

EVERYTHING = slice(None)


class MergedAttention:
    """The layer as far as the means of values."""

    def __init__(self, fit: Fit, attention: Attention) -> None:
        self.fit, self.attention = fit, attention

    def means(
        self,
        values: Tensor,
        b: int,
        blocks: Sequence[Block],
        scales: Sequence[Mapping[str, Tensor]] = (),
        units: slice | list[int] = EVERYTHING,
    ) -> Tensor:
        """Values `[samples, heads, positions, any]` averaged by the attention weights of the heads in `blocks`.

        Without any, by those of the queries and keys that the model has.

        Args:
            scales: by block tensors between the maps and the logits in the place of the model's.
            units: those of a head that may be other than zero.
        """
        node, weights = self.attention.node, self.attention.weights
        if weights is not None:
            return self._weights(weights, len(values), b, blocks, scales) @ values
        query, key = (x[..., units] for x in self.asked(b, blocks, scales))
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        # Of one width all three are computed several times faster. More zeros change no product of queries and keys.
        more = max(0, values.shape[-1] - query.shape[-1])
        query, key = functional.pad(query, (0, more)), functional.pad(key, (0, more))
        if node.kwargs.get("scale") is None:
            query = query * (query.shape[-1] / self.attention.width) ** 0.5
        known = dict(zip(node.args[:3], (query, key, values), strict=True))
        bias = bias_of(node)
        if bias is not None and differs_by_head(bias):  # empty heads have one, too
            known[bias] = self.fit.values.peek(bias, b, {})[..., : query.shape[1], :, :]
        return self.fit.values.follow([node], known, MERGED, b)[node]  # type: ignore[arg-type]

    def values(self, slope: Tensor, shift: Tensor | None, groups: int, shared_by: int, b: int) -> Tensor:
        """What maps of the layer's input, `groups` of heads one after the other, give every head that shares them,
        `[samples, heads, positions, any]`.
        """
        x = self.fit.values.of(self.attention.value.site.node.args[0], MERGED, b)  # type: ignore[arg-type]
        own = functional.linear(x, slope, shift).unflatten(-1, (groups, -1)).transpose(1, 2)
        return own.repeat_interleave(shared_by, 1)

    def put(self, means: Tensor, b: int) -> None:
        """Keep the means as what the layer's attention gives; heads of zeros come behind where the layer has more."""
        node, values = self.attention.node, self.fit.values
        width = self.fit.matrix(self.attention.output).shape[1]
        more = width // means.shape[-1] - means.shape[1]
        means = functional.pad(means, (0, 0, 0, 0, 0, more)) if more else means
        values.store[node, MERGED, b] = means.flatten(0, 1) if len(shape_of(node)) == 3 else means

    def kept(self, b: int) -> Tensor:
        """What `put` kept, head by head, `[samples, positions, units]`."""
        means = self.fit.values.store[self.attention.node, MERGED, b]
        if means.dim() == 3:
            means = means.unflatten(0, (-1, self.fit.matrix(self.attention.output).shape[1] // means.shape[-1]))
        return means.transpose(1, 2).flatten(2)

    def drop(self) -> None:
        """Forget what was kept; it is made anew from now on."""
        for b in range(len(self.fit.values.batches)):
            self.fit.values.store.pop((self.attention.node, MERGED, b))

    def has_shift(self, own: Heads) -> bool:
        """Whether a map's bias makes a difference."""
        return own.site.bias is not None and (own is self.attention.query or self.attention.logits != "plain")

    def write(self, own: Heads, rows: Tensor) -> None:
        """Put queries or keys into the merged model."""
        self.fit.write(own.site, *self._affine(own, rows), own.rows)

    def _affine(self, own: Heads, rows: Tensor) -> tuple[Tensor, Tensor]:
        """A slope and a shift of rows that may have both."""
        return (rows[:, :-1], rows[:, -1]) if self.has_shift(own) else (rows, rows[:, 0] * 0)

    def asked(
        self, b: int, blocks: Sequence[Block], scales: Sequence[Mapping[str, Tensor]] = ()
    ) -> tuple[Tensor, Tensor]:
        """The heads' queries and keys, `[samples, heads, positions, head_dim]`, of an expert's width; see `means`."""
        attention, values = self.attention, self.fit.values
        found = []
        for block, own_scales in zip_longest(blocks or [(None, None)], scales, fillvalue={}):
            parts, tensors = [], ChainMap(dict(own_scales), values.merged)
            for node, own, rows in zip(attention.node.args, attention.asked, block, strict=False):
                known = {} if rows is None else {own.site.node: self._put_out(own, own.site.node, rows, b)}
                if known:  # what the walk computed of the model's own queries and keys is no matter
                    known = values.follow(self._steps(node), known, MERGED, b, tensors)  # type: ignore[arg-type]
                parts.append(values.peek(node, b, known))  # type: ignore[arg-type]
            found.append(parts)
        query, key = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
        return query, key

    def _weights(
        self, node: fx.Node, samples: int, b: int, blocks: Sequence[Block], scales: Sequence[Mapping[str, Tensor]]
    ) -> Tensor:
        """The weights that ops make of queries and keys, maybe of one map: `[samples, heads, rows, columns]`."""
        values, found = self.fit.values, []
        for block, own_scales in zip_longest(blocks or [()], scales, fillvalue={}):
            known: dict[fx.Node, Tensor] = {}
            for own, rows in zip(self.attention.asked, block, strict=True) if block else ():
                for place in own.places:
                    made = self._put_out(own, place, rows, b)
                    known[place] = known[place] + made if place in known else made
            if known:
                tensors = ChainMap(dict(own_scales), values.merged)
                known = values.follow(self._steps(node), known, MERGED, b, tensors)
            made = values.peek(node, b, known)
            found.append(made.reshape(samples, -1, *made.shape[-2:]))
        return torch.cat(found, 1)

    def _steps(self, node: fx.Node) -> list[fx.Node]:
        """The ops between maps that are solved apart and what the layer's op reads, in the order they run, with those
        that make their weights.
        """
        apart, program, found, todo = self.attention.apart, self.fit.values.program, set[fx.Node](), [node]
        while apart is not None and todo:
            current = todo.pop()
            if current in apart.steps and current not in found:
                found |= {current, *program.made_of_weights(current)}
                todo += current.all_input_nodes
        maps = set() if apart is None else apart.places  # and what these are made from is known
        return sorted(found - maps - program.before(maps), key=program.position.__getitem__)

    def _put_out(self, own: Heads, place: fx.Node, rows: Tensor, b: int) -> Tensor:
        """What a map puts out with some rows at a place, among the outputs of the weight that they are in."""
        x = self.fit.values.of(place.args[0], MERGED, b)  # type: ignore[arg-type]
        slope, shift = (part.to(x) for part in self._affine(own, rows))
        made = functional.linear(x, slope, shift)
        whole = made.new_zeros(*made.shape[:-1], self.fit.matrix(own.site).shape[0])
        whole[..., own.rows] = made
        return whole
