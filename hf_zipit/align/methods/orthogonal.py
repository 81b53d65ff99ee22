"""Orthogonal alignment: rotate the residual streams, match everything else within its own symmetry (Generalized Linear
Mode Connectivity for Transformers, arXiv 2506.22712).

A transformer's stream allows rotations once the norms' affine parts are folded into their readers. Procrustes on what
the experts compute there (`procrustes.py`) is much freer than any order of the units, and the published runs on ViT
and GPT-2 found lower barriers for it. What is inside the heads allows any invertible map; circuits decide it from the
weights (`circuits.py`, which also is the data-free form of this method). Hidden units and channels have a nonlinearity
of their own and are permuted, by their activations.

Where a stream allows no rotation (post-LN models such as BERT, whose norm puts out the stream; BatchNorm) it is
permuted like the rest.
"""

from __future__ import annotations

from hf_zipit.align.circuit_pairs import circuits_of, in_own_basis, match_family
from hf_zipit.align.method import Network, register
from hf_zipit.align.procrustes import rotate_streams, rotating
from hf_zipit.align.solver import Choice, Solver
from hf_zipit.maps.space_map import Map
from hf_zipit.symmetry.spec import Symmetry


@register(
    "orthogonal", needs={"moments", "covariances", "weights"}, scope="network", least=Symmetry.HALF_TURNS, folds=True
)
def match_orthogonal(network: Network) -> dict[str, Map]:
    """Streams by Procrustes, heads by circuits, the rest by `permute`."""
    network, families = circuits_of(network)
    streams = [name for name in rotating(network.spec) if name in network.opened]
    maps: dict[str, Map] = dict(network.fixed_maps)
    maps |= rotate_streams(network.spec, network.covariances, network.experts, streams)
    inside = {name for family in families for name in family.members}
    rest = [name for name in network.opened if name not in maps and name not in inside]
    solver = Solver(network, maps)
    solver.solve(dict.fromkeys(rest, Choice.of("permute", {})))
    for family in families:
        maps |= {name: in_own_basis(m) for name, m in match_family(family, network, maps).items()}
    return {name: maps[name] for name in network.opened}
