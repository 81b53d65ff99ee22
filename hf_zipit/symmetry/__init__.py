"""Which units of a model may be reordered or rotated: inferred from its traced forward pass, then proven."""

from __future__ import annotations

from hf_zipit.symmetry.proof import prove
from hf_zipit.symmetry.spec import MergeSpec

__all__ = ["MergeSpec", "prove"]
