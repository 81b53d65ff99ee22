"""Atoms: the pieces that axes are made of, in a union-find that can split and that remembers duality.

Every axis of every tensor starts as one fresh atom. Running the network's ops ties atoms that must move together
(`tie`), splits an atom where a reshape does (`split`: an attention width into heads x head_dim), and lowers the
symmetry of what an op touches (`restrict`).

Duality: if a vector moves as `x -> g x`, what is contracted with it moves as `w -> w g^-1`. A reference to an atom
says on which side it stands. An atom that is tied to its own dual can only move by maps with `g = g^-T`: orthogonal
ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from hf_zipit.symmetry.spaces import Symmetry


@dataclass(frozen=True)
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

    def fresh(self, size: int, symmetry: Symmetry = Symmetry.LINEAR, reason: str | None = None) -> Axis:
        """A new axis of one atom; an axis of size one has none, as there is nothing to move."""
        if size == 1:
            return ()
        atom = len(self._parent)
        self._parent.append(Ref(atom))
        self._size.append(size)
        self._symmetry.append(symmetry)
        self._reason.append(reason)
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
        """What an atom allows, and `symmetry` as well."""
        left = self._symmetry[atom].meet(symmetry)
        if left is not self._symmetry[atom]:
            self._symmetry[atom] = left
            self._reason[atom] = reason or self._reason[atom]

    def split(self, ref: Ref, major: int) -> Axis:
        """Split an unsplit root atom into `(major, size / major)`; the parts inherit its symmetry, if they can."""
        size, symmetry, reason = self._size[ref.atom], self._symmetry[ref.atom], self._reason[ref.atom]
        if symmetry is Symmetry.ROTARY:  # a part of it does not have its pairs
            symmetry = Symmetry.FIXED
        parts = self.fresh(major, symmetry, reason) + self.fresh(size // major, symmetry, reason)
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
        self._lower(x.atom, self._symmetry[y.atom], self._reason[y.atom])
        self._parent[y.atom] = x.flipped(y.dual)

    def regroup(self, axes: list[Axis], shape: list[int], reason: str) -> list[Axis]:
        """The axes of a tensor after a reshape to `shape`: atoms are split where an output axis ends inside one."""
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
                axis.append(refs.pop(0))
            if self.size(tuple(axis)) != size:
                for touched in axes:
                    self.restrict(touched, Symmetry.FIXED, reason)
                return [self.fresh(n, Symmetry.FIXED, reason) for n in shape]
            out.append(tuple(axis))
        return out
