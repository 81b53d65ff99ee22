"""Names the atoms of an interpreted graph: spaces, axis labels, probes and crossings, all in a `Trace`."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, product

from torch import fx, nn

from hf_zipit.symmetry.atoms import Axis, Ref
from hf_zipit.symmetry.interpreter import Interpreter, Use
from hf_zipit.symmetry.ops import Value, shape_of
from hf_zipit.symmetry.spaces import (
    AxisLabel,
    Block,
    Crossing,
    Factor,
    Place,
    Probe,
    Space,
    Sum,
    Symmetry,
    Trace,
    product_key,
)

Span = tuple[int, int, int] | None
"""Which units of an axis: see `Probe.span`."""

WRITTEN_BY_MANY = 3
"""A space that at least this many modules write into is a residual stream."""


class Naming:
    """The names and labels of one interpreted graph."""

    def __init__(self, run: Interpreter, model: nn.Module) -> None:
        run.close()
        self.run = run
        self.atoms = run.atoms
        self.model = model
        self.uses = {name: uses for name in run.tensors if (uses := self._uses(name))}
        used = {name: run.tensors[name] for name in self.uses}
        self.labels = {name: [self.atoms.resolve(axis) for axis in value.axes] for name, value in used.items()}
        order = {module: i for i, module in enumerate(run.order)}
        self.sorted = sorted(self.labels, key=lambda name: order[self.uses[name][0].module])
        self.flip = self._orientation()
        self.within = self._within()
        self.names = self._names()

    def _uses(self, name: str) -> list[Use]:
        """Where a tensor is used; where its first twin is, if it is tied and never used under its own name.

        (BART's shared table is run as the encoder's embeddings, the decoder's, and the head.)
        """
        twins = (self.run.uses[twin] for twin in self.run.ties.get(name, ()) if twin in self.run.uses)
        return self.run.uses.get(name) or next(twins, [])

    def _orientation(self) -> dict[int, bool]:
        """Which side of every atom is the vector: the one that most linear maps put out.

        The union-find only knows which references are on the same side.
        """
        votes: Counter[int] = Counter()
        first: dict[int, bool] = {}
        vectors = [axes[0] for axes in (self.labels[name] for name in self.sorted) if len(axes) == 1]
        for axis in [*self.run.held, *vectors]:
            for ref in self._leaves(axis):
                votes[ref.atom] += -1 if ref.dual else 1
                first.setdefault(ref.atom, ref.dual)
        return {atom: votes[atom] < 0 or (votes[atom] == 0 and dual) for atom, dual in first.items()}

    def _company(self) -> dict[int, set[int]]:
        """For every atom, the atoms that are present wherever it is, as one and the same axis.

        Where an atom shows up twice in one tensor (a Gram matrix of heads), nobody can tell which of the two an inner
        atom belongs to, so it is no company there.
        """
        company: dict[int, set[int]] = {}
        chosen = [({r.atom for axis in axes for r in self._leaves(axis)}, {r.atom for r in self._leaves(names)})
                  for axes, names in self.run.chosen]  # fmt: skip
        for axes in self._everywhere():
            for together in product(*map(self.atoms.products, axes)):
                times = Counter(ref.atom for axis in together for ref in axis)
                once = {atom for atom, count in times.items() if count == 1}
                once |= {atom for places, units in chosen if places <= once for atom in units}
                for atom in times:
                    company[atom] = company.get(atom, once) & once
        return company

    def _everywhere(self) -> Iterator[Sequence[Axis]]:
        yield from self.run.seen
        yield from (value.axes for value in self.run.tensors.values())

    def _within(self) -> dict[int, tuple[int, ...]]:
        """For every atom those it lives within: major to it in a label, and its company everywhere."""
        company = self._company()
        within: dict[int, tuple[int, ...]] = {}
        for name in self.sorted:
            for axis in chain(*map(self.atoms.products, self.labels[name])):
                for i, ref in enumerate(axis):
                    self._note_within(within, ref, axis[:i], company)
        for name in self.sorted:  # stacks of matrices, such as those of experts or heads, are numbered by earlier axes
            axes = self.labels[name]
            if len(axes) > 2 and not self._is_convolution(name.rpartition(".")[0]):
                for i, axis in enumerate(axes):
                    majors = tuple(chain(*map(self.atoms.resolve, axes[:i])))
                    for ref in chain(*self.atoms.products(axis)):
                        if not within[ref.atom]:
                            self._note_within(within, ref, majors, company)
        return within

    def _note_within(
        self, within: dict[int, tuple[int, ...]], ref: Ref, majors: Axis, company: Mapping[int, set[int]]
    ) -> None:
        """Add to `within` those of some atoms that another one lives within, if they are more than those known."""
        known = within.setdefault(ref.atom, ())
        # Of two that are always together, only one can live within the other.
        found = [r.atom for r in majors if r.atom in company[ref.atom] - {ref.atom}]
        found = [atom for atom in found if ref.atom not in within.get(atom, ())]
        if len(found) > len(known):
            within[ref.atom] = tuple(found)

    def _names(self) -> dict[int, str]:
        """A path-like name for every atom of a tensor, after the module that writes it first."""
        owners: dict[int, dict[str, None]] = defaultdict(dict)
        writers: dict[int, dict[str, None]] = defaultdict(dict)
        place: dict[int, str] = {}
        outer: set[int] = set()
        summed: set[int] = set()
        for name in self.sorted:
            module = name.rpartition(".")[0]
            for i, label in enumerate(self.labels[name]):
                terms = self.atoms.products(label)
                summed |= {ref.atom for axis in terms for ref in axis if len(terms) > 1}
                for axis in terms:
                    for j, ref in enumerate(axis):
                        owners[ref.atom][module] = None
                        place.setdefault(ref.atom, f"{name}.{i}" if len(axis) == 1 else f"{name}.{i}.{j}")
                        if j + 1 < len(axis):
                            outer.add(ref.atom)
        for module, _, axis, _ in self.run.writers:
            for ref in self._leaves(axis):
                writers[ref.atom][module] = None
        names: dict[int, str] = {}
        taken: Counter[str] = Counter()
        for atom, owned_by in owners.items():
            if self.atoms.symmetry(Ref(atom)) is Symmetry.FIXED:
                name = place[atom]
            elif atom in outer:
                parent = common_parent(list(writers[atom]) or list(owned_by))
                heads = len(writers[atom]) != 1 or atom in summed
                heads = heads and not any(map(self._is_convolution, writers[atom]))
                name = f"{parent}.heads" if heads else f"{next(iter(writers[atom]))}.groups"
            elif len(writers[atom]) >= WRITTEN_BY_MANY:
                name = f"{common_parent(list(writers[atom]))}.residual"
            else:
                name = next(iter(writers[atom] or owned_by)) or place[atom]
            name = name.removeprefix(".")
            taken[name] += 1
            names[atom] = name if taken[name] == 1 else f"{name}#{taken[name]}"
        return names

    def _is_convolution(self, module: str) -> bool:
        return isinstance(self.run.modules.get(module), (nn.Conv1d, nn.Conv2d, nn.Conv3d))

    def label(self, axis: Axis) -> AxisLabel:
        return tuple(self._factor(ref) for ref in self.atoms.resolve(axis))

    def _factor(self, ref: Ref) -> Factor | Sum:
        if terms := self.atoms.terms(ref):
            return Sum(tuple(map(self.label, terms)))
        return Factor(self.names[ref.atom], ref.dual ^ self.flip.get(ref.atom, False))

    def _leaves(self, axis: Axis) -> list[Ref]:
        """The atoms of an axis, those of its sums as well."""
        return [ref for part in self.atoms.products(axis) for ref in part]

    def value_label(self, value: Value) -> tuple[AxisLabel, ...]:
        """One label per axis of a value; empty for axes (tokens, positions) that no tensor of the model has."""
        known = (all(ref.atom in self.names for ref in self._leaves(axis)) for axis in value.axes)
        return tuple(self.label(axis) if named else () for axis, named in zip(value.axes, known, strict=True))

    def crossings(self) -> tuple[Crossing, ...]:
        found: dict[Crossing, None] = {}
        for source, value, made, read, stack in self.run.crossings:
            axes = self.value_label(value)
            moving = [place for place, axis in enumerate(value.axes) if self.moves(axis)]
            if moving and any(axes):
                beside = tuple(self._beside(path, source, moving) for path in stack)
                found[Crossing(source.name, axes, made, read, stack, beside)] = None
        return tuple(found)

    def _beside(self, path: str, source: fx.Node, moving: Sequence[int]) -> tuple[str, ...]:
        """What else a module is given that has as many axes, and as many units on those that move."""
        own = shape_of(source)
        others = [(other, shape_of(other)) for other in self.run.given[path] if other is not source]
        return tuple(o.name for o, s in others if len(s) == len(own) and all(s[i] == own[i] for i in moving))

    def spaces(self) -> dict[str, Space]:
        return {
            name: Space(
                name,
                self.atoms.size((Ref(atom),)),
                self.atoms.symmetry(Ref(atom)),
                tuple(self.names[major] for major in self.within.get(atom, ())),
                self.atoms.reason(Ref(atom)) if self.atoms.symmetry(Ref(atom)) is Symmetry.FIXED else None,
            )
            for atom, name in self.names.items()
        }

    def probes(self, spaces: Mapping[str, Space]) -> tuple[Probe, ...]:
        """Where to observe every product: at the inputs of what reads it, else at the outputs of what writes it.

        A tensor that several modules read (the normed stream that query, key and value share) is observed once. Where
        another axis of it moves (heads), its rows are those of different units in each expert: that is no place to
        observe what can be observed elsewhere, and no place at all where that is so of most rows (what mixes tokens
        runs over the stream's units): weights tell more.
        """
        found: dict[Probe, bool] = {}
        observed: set[fx.Node] = set()
        for read in self.run.readers:
            hidden = read.source in observed or self._strays(read.others)
            parts = [] if hidden else self._observable(read.axis, spaces)
            if parts:
                observed.add(read.source)
            paired = not any(self.moves(axis) for axis in read.others)
            for part, span in parts:
                found[Probe(read.module, "input", read.position, product_key(part), _read(part), span)] = paired
        known = {name for probe, paired in found.items() if paired for name in probe.key}
        probes = {probe: None for probe, paired in found.items() if paired or not known >= {*probe.key}}
        keys = {probe.key for probe in probes}
        for module, position, axis, others in self.run.writers:
            for part, span in [] if self._strays(others) else self._observable(axis, spaces):
                if product_key(part) not in keys:
                    probes[Probe(module, "output", position, product_key(part), _read(part), span)] = None
        return tuple(probes)

    def _strays(self, rows: Sequence[Axis]) -> bool:
        """Whether more than half of the units of an axis of these can move."""
        size = self.atoms.size
        named = [axis for axis in rows if all(ref.atom in self.names for ref in self._leaves(axis))]
        return any(2 * sum(size(p) for p in self.atoms.products(x) if self.moves(p)) > size(x) for x in named)

    def moves(self, axis: Axis) -> bool:
        """Whether some of the units of an axis can move."""
        return any(self.atoms.symmetry(ref) is not Symmetry.FIXED for ref in self._leaves(axis))

    def _observable(self, axis: Axis, spaces: Mapping[str, Space]) -> list[tuple[AxisLabel, Span]]:
        """The movable products that an axis is the sum of, and where they are on it."""
        if any(ref.atom not in self.names for ref in self._leaves(axis)):
            return []
        found = [(axis, None)] if not any(map(self.atoms.terms, self.atoms.resolve(axis))) else self._terms(axis)
        labels = ((self.label(part), span) for part, span in found)
        return [(p, span) for p, span in labels if any(spaces[f.space].symmetry is not Symmetry.FIXED for f in p)]

    def _terms(self, axis: Axis) -> list[tuple[Axis, Span]]:
        """The terms without sums of an axis with a sum, and where they are on it."""
        axis = self.atoms.resolve(axis)
        place = next(i for i, ref in enumerate(axis) if self.atoms.terms(ref))
        before, summed, after = axis[:place], axis[place], axis[place + 1 :]
        minor, start, found = self.atoms.size(after), 0, []
        width = self.atoms.size((summed,)) * minor
        for term in self.atoms.terms(summed):
            stop = start + self.atoms.size(term) * minor
            if not any(map(self.atoms.terms, before + term + after)):
                found.append((before + term + after, (width, start, stop)))
            start = stop
        return found

    def spec(
        self,
        towers: Sequence[Sequence[str]],
        head: Sequence[str],
        outputs: Mapping[str, Value],
        samples: int,
    ) -> Trace:
        spaces = self.spaces()
        axes = {name: tuple(self.label(axis) for axis in self.labels[name]) for name in self.sorted}
        everything = dict(self.model.named_parameters(remove_duplicate=False))
        everything.update(self.model.named_buffers(remove_duplicate=False))
        places = {name: last_place([use.place for use in uses]) for name, uses in self.uses.items()}
        return Trace(
            architecture=type(self.model).__name__,
            spaces=spaces,
            axes=axes,
            unused=frozenset(name for name in everything if name not in self.uses),
            probes=self.probes(spaces),
            modules=tuple(self.run.order),
            blocks=tuple(Block(path, tower) for tower, blocks in enumerate(towers) for path in blocks),
            head=tuple(head),
            places=places,
            first_places={name: uses[0].place for name, uses in self.uses.items()},
            crossings=self.crossings(),
            outputs={name: self.value_label(value) for name, value in outputs.items()},
            output_places=dict(zip(outputs, self.run.output_places, strict=True)),
            unknown_ops={name: tuple(modules) for name, modules in self.run.unknown_ops.items()},
            macs=dict(self.run.macs),
            samples=samples,
        )


def _read(label: AxisLabel) -> tuple[str, ...]:
    return tuple(factor.space for factor in label if factor.dual)


def last_place(places: Sequence[Place]) -> Place:
    blocks = tuple(max(column) for column in zip(*(p.blocks for p in places), strict=True))
    return Place(blocks, any(p.head for p in places))


def common_parent(paths: Sequence[str]) -> str:
    """The longest path that all modules share."""
    parts = [path.split(".")[:-1] for path in paths]
    shared = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return ".".join(shared)
