"""Atoms: the pieces that axes are made of, in a union-find that can split and that remembers duality.

Every axis of every tensor starts as one fresh atom. Running the network's ops ties atoms that must move together
(`tie`), splits an atom where a reshape does (`split`: an attention width into heads x head_dim), and lowers the
symmetry of what an op touches (`restrict`).

An axis can also be the direct sum of axes: what a concatenation joins (`join`) and what a slice or a chunk cuts
(`cut`), such as one projection to queries, keys and values.

Duality: if a vector moves as `x -> g x`, what is contracted with it moves as `w -> w g^-1`. A reference to an atom
says on which side it stands. An atom that is tied to its own dual can only move by maps with `g = g^-T`: orthogonal
ones.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod

from hf_zipit.symmetry.spaces import Symmetry


@dataclass(frozen=True, order=True)
class Ref:
    """A reference to an atom, from its vector or its dual side."""

    atom: int
    dual: bool = False

    def flipped(self, flip: bool = True) -> Ref:
        return Ref(self.atom, self.dual ^ flip)


Axis = tuple[Ref, ...]
"""The atoms whose product an axis is, major to minor; empty for an axis of size one."""


def dual(axis: Axis) -> Axis:
    return tuple(ref.flipped() for ref in axis)


class Atoms:
    """Union-find over atoms with sizes, symmetries and splits."""

    def __init__(self) -> None:
        self._parent: list[Ref] = []
        self._size: list[int] = []
        self._symmetry: list[Symmetry] = []
        self._reason: list[str | None] = []
        self._parts: dict[int, Axis] = {}
        self._terms: dict[int, tuple[Axis, ...]] = {}
        self._taken: list[Axis] = []
        self._left: list[Axis] = []

    def fresh(self, size: int, symmetry: Symmetry = Symmetry.LINEAR, reason: str | None = None) -> Axis:
        """A new axis of one atom; an axis of size one has none, as there is nothing to move."""
        if size == 1:
            return ()
        atom = len(self._parent)
        self._parent.append(Ref(atom))
        self._size.append(size)
        self._symmetry.append(symmetry if size else Symmetry.FIXED)
        self._reason.append(reason if size else "it is empty")
        return (Ref(atom),)

    def _find(self, ref: Ref) -> Ref:
        parent = self._parent[ref.atom]
        if parent.atom == ref.atom:
            return ref
        root = self._find(parent)
        self._parent[ref.atom] = root
        return root.flipped(ref.dual)

    def resolve(self, axis: Axis) -> Axis:
        """The axis in terms of root atoms that are not split any further."""
        out: list[Ref] = []
        for ref in axis:
            root = self._find(ref)
            if root.atom in self._parts:
                out.extend(self.resolve(tuple(p.flipped(root.dual) for p in self._parts[root.atom])))
            else:
                out.append(root)
        return tuple(out)

    def terms(self, ref: Ref) -> tuple[Axis, ...]:
        """The axes whose direct sum a root atom is; empty where it is none."""
        found: list[Axis] = []
        for term in self._terms.get(ref.atom, ()):
            term = self.resolve(dual(term) if ref.dual else term)
            found += (self.terms(term[0]) if len(term) == 1 else ()) or [term]  # a sum of sums is one sum
        return tuple(found)

    def products(self, axis: Axis) -> list[Axis]:
        """The axes without sums whose direct sum an axis is, in the order of their units' numbers within them."""
        axis = self.resolve(axis)
        for i, ref in enumerate(axis):
            if terms := self.terms(ref):
                return [product for term in terms for product in self.products(axis[:i] + term + axis[i + 1 :])]
        return [axis]

    def join(self, axes: Sequence[Axis], reason: str) -> Axis:
        """The direct sum of some axes, of which one has an atom at least."""
        axes = [axis for axis in axes if self.size(axis)]
        if len(axes) == 1:
            return axes[0]
        size = sum(map(self.size, axes))
        if all(self.symmetry(ref) is Symmetry.FIXED for axis in axes for ref in self._leaves(axis)):
            return self.fresh(size, Symmetry.FIXED, reason)
        (ref,) = joined = self.fresh(size)
        self._terms[ref.atom] = tuple(axes)
        return joined

    def take(self, axis: Axis, sizes: Sequence[int], taken: Collection[int], reason: str) -> list[Axis]:
        """Some of the axes of given sizes whose direct sum an axis is.

        What is left, and not taken elsewhere, stays fixed: where a table of positions is sliced, how much of it is
        left depends on the input.
        """
        parts = self.cut(axis, sizes, reason)
        self._taken += [parts[i] for i in taken]
        self._left += [part for i, part in enumerate(parts) if i not in taken]
        return [parts[i] for i in taken]

    def cut(self, axis: Axis, sizes: Sequence[int], reason: str) -> list[Axis]:
        """The axes of given sizes whose direct sum an axis is: its major atom is cut, if the others divide them."""
        axis = self.resolve(axis)
        if len(sizes) < 2:
            return [axis]
        minor = self.size(axis[1:])
        if any(size % minor for size in sizes):
            self.restrict(axis, Symmetry.FIXED, reason)
            return [self.fresh(size, Symmetry.FIXED, reason) for size in sizes]
        parts = self._cut(axis[0], [size // minor for size in sizes], reason)
        return [self.resolve(part + axis[1:]) for part in parts]

    def _cut(self, ref: Ref, sizes: Sequence[int], reason: str) -> list[Axis]:
        """As `cut`, of one root atom; where it is a sum already, its terms are cut or joined again."""
        if ref.atom not in self._terms:
            self._terms[ref.atom] = self._pieces(ref, sizes)
        waiting, found = list(self.terms(ref)), []
        for size in sizes:
            group: list[Axis] = []
            while (need := size - sum(map(self.size, group))) > 0:
                term = waiting.pop(0)
                if self.size(term) > need:
                    term, rest = self.cut(term, [need, self.size(term) - need], reason)
                    waiting.insert(0, rest)
                group.append(term)
            found.append(group[0] if len(group) == 1 else self.join(group, reason))
        return found

    def _pieces(self, ref: Ref, sizes: Sequence[int]) -> tuple[Axis, ...]:
        """New atoms with what they inherit of an atom's symmetry: a part of a rotary one does not have its pairs."""
        symmetry, reason = self._symmetry[ref.atom], self._reason[ref.atom]
        symmetry = Symmetry.FIXED if symmetry.in_pairs else symmetry
        return tuple(self.fresh(size, symmetry, reason) for size in sizes)

    def _leaves(self, axis: Axis) -> set[Ref]:
        return {ref for product in self.products(axis) for ref in product}

    def close(self) -> None:
        """Fix what was left when the rest of it was taken, and take sums in which nothing moves for fixed atoms."""
        taken = {ref.atom for axis in self._taken for ref in self._leaves(axis)}
        for leaf in {ref for axis in self._left for ref in self._leaves(axis)}:
            if leaf.atom not in taken:
                self.restrict((leaf,), Symmetry.FIXED, "a part of it is sliced off")
        closed = []
        for atom in list(self._terms):
            leaves = self._leaves((Ref(atom),))
            if all(self.symmetry(leaf) is Symmetry.FIXED for leaf in leaves):
                self._symmetry[atom] = Symmetry.FIXED
                why = next(map(self.reason, sorted(leaves)), "each of its units is a part of its own")
                self._reason[atom] = self._reason[atom] or why
                closed.append(atom)
        for atom in closed:
            del self._terms[atom]

    def size(self, axis: Axis) -> int:
        return prod(self._size[ref.atom] for ref in axis)

    def symmetry(self, ref: Ref) -> Symmetry:
        return self._symmetry[self._find(ref).atom]

    def reason(self, ref: Ref) -> str | None:
        return self._reason[self._find(ref).atom]

    def restrict(self, axis: Axis, symmetry: Symmetry, reason: str | None = None) -> None:
        """Allow the atoms of `axis` at most `symmetry`."""
        for ref in self.resolve(axis):
            self._lower(ref.atom, symmetry, reason)

    def _lower(self, atom: int, symmetry: Symmetry, reason: str | None) -> None:
        """What an atom allows, and `symmetry` as well; of a sum, all its terms."""
        if atom in self._terms and symmetry.in_pairs:  # its pairs would stand in different terms
            symmetry = Symmetry.FIXED
        for term in self._terms.get(atom, ()):
            self.restrict(term, symmetry, reason)
        left = self._symmetry[atom].meet(symmetry)
        if left is not self._symmetry[atom]:
            self._symmetry[atom] = left
            self._reason[atom] = reason or self._reason[atom]

    def split(self, ref: Ref, major: int) -> Axis:
        """Split an unsplit root atom into `(major, size / major)`; the parts inherit its symmetry, if they can.

        A sum becomes a product first: of its number of terms and one of them, if they are equally long.
        """
        size, terms = self._size[ref.atom], self._terms.pop(ref.atom, ())
        if terms:
            why = "it is a direct sum in one place and a product in another"
            if len({self.size(term) for term in terms}) > 1:
                self.restrict(tuple(leaf for term in terms for leaf in term), Symmetry.FIXED, why)
                parts = self.fresh(major, Symmetry.FIXED, why) + self.fresh(size // major, Symmetry.FIXED, why)
            else:
                for other in terms[1:]:
                    self.tie(terms[0], other, why)
                parts = self.fresh(len(terms), Symmetry.FIXED, why) + terms[0]
        else:
            first, second = self._pieces(ref, [major, size // major])
            parts = first + second
        self._parts[ref.atom] = parts
        return tuple(part.flipped(ref.dual) for part in parts)

    def tie(self, left: Axis, right: Axis, reason: str) -> None:
        """Make two axes of equal size move together, splitting atoms where only one side is a product."""
        a, b = list(self.resolve(left)), list(self.resolve(right))
        while a and b:
            x, y = a.pop(0), b.pop(0)
            size_x, size_y = self._size[x.atom], self._size[y.atom]
            if size_x == size_y:
                self._union(x, y)
            elif size_x % size_y == 0:
                a[:0], b[:0] = self.split(x, size_y), [y]
            elif size_y % size_x == 0:
                a[:0], b[:0] = [x], self.split(y, size_x)
            else:  # two reshapes that cut the same axis at places which do not nest
                a[:0], b[:0] = [x], [y]
                break
            # An atom that was just split may stand elsewhere in what is left to walk.
            a, b = list(self.resolve(tuple(a))), list(self.resolve(tuple(b)))
        self.restrict(tuple(a + b), Symmetry.FIXED, reason)

    def _union(self, x: Ref, y: Ref) -> None:
        if x.atom == y.atom:
            if x.dual != y.dual:
                self.restrict((x,), Symmetry.ORTHOGONAL, "it is read and written by the same tensor")
            return
        if self._terms.keys() >= {x.atom, y.atom}:
            self._tie_terms(x, y)
        elif y.atom in self._terms:
            x, y = y, x
        self._lower(x.atom, self._symmetry[y.atom], self._reason[y.atom])
        self._parent[y.atom] = x.flipped(y.dual)

    def _tie_terms(self, x: Ref, y: Ref) -> None:
        """Tie two sums, both cut where one of them is."""
        ends = {end for ref in (x, y) for end in accumulate(map(self.size, self.terms(ref)))}
        sizes = [end - start for start, end in pairwise([0, *sorted(ends)])]
        why = "two direct sums do not fit"
        for left, right in zip(self._cut(x, sizes, why), self._cut(y, sizes, why), strict=True):
            self.tie(left, right, why)

    def regroup(self, axes: Sequence[Axis], shape: Sequence[int], reason: str) -> list[Axis]:
        """The axes of a tensor after a reshape to `shape`: atoms are split where an output axis ends inside one.

        Axes that do not fit are fixed, those before and after them are not.
        """
        out: list[Axis] = []
        start = begin = 0
        while start < len(axes) or begin < len(shape):
            stop, end = min(start + 1, len(axes)), min(begin + 1, len(shape))
            while (have := prod(map(self.size, axes[start:stop]))) != (need := prod(shape[begin:end])):
                if (have < need or end == len(shape)) and stop < len(axes):
                    stop += 1
                elif end < len(shape):
                    end += 1
                else:
                    break
            out += self._regroup(axes[start:stop], shape[begin:end], reason)
            start, begin = stop, end
        return out

    def _regroup(self, axes: Sequence[Axis], shape: Sequence[int], reason: str) -> list[Axis]:
        """As `regroup`, of axes of which no fewer become axes of their own."""
        refs = [ref for axis in axes for ref in self.resolve(axis)]
        out: list[Axis] = []
        for size in shape:
            axis: list[Ref] = []
            while self.size(tuple(axis)) < size and refs:
                need, rest = divmod(size, self.size(tuple(axis)))
                ref = refs[0]
                have = self._size[ref.atom]
                if rest or (have > need and have % need):
                    refs = []  # an output axis ends inside an atom that it does not divide
                    break
                if have > need:
                    parts = self.split(ref, need)
                    refs = list(self.resolve((*parts, *refs[1:])))
                    axis = list(self.resolve(tuple(axis)))
                    out = [self.resolve(done) for done in out]
                else:
                    axis.append(refs.pop(0))
            if self.size(tuple(axis)) != size:
                for touched in axes:
                    self.restrict(touched, Symmetry.FIXED, reason)
                return [self.fresh(n, Symmetry.FIXED, reason) for n in shape]
            out.append(tuple(axis))
        return out
