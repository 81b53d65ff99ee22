"""One rule per kind of ATen op; importing this package registers them all (see `ops.py` for what a rule does)."""

from __future__ import annotations

from hf_zipit.symmetry.ops import PATTERNS, RULES
from hf_zipit.symmetry.rules import contractions, elementwise, indexing, norms, reductions, rotary, selected, shapes

__all__ = [
    "PATTERNS",
    "RULES",
    "contractions",
    "elementwise",
    "indexing",
    "norms",
    "reductions",
    "rotary",
    "selected",
    "shapes",
]
