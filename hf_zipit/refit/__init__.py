"""Refit: every module of the trunk regressed on what the experts' modules compute, without labels.

Combining weights can never undo what averaging breaks; least squares on the experts' own features can. The idea and
its relatives (PLeaS, arXiv 2407.02447; RegMean++) are described in `walk.py`, where it happens.
"""

from __future__ import annotations

from hf_zipit.config import RefitConfig
from hf_zipit.refit.report import RefitReport

__all__ = ["RefitConfig", "RefitReport"]
