"""Embeddings of experts that were brought to one vocabulary: rows of tokens which an expert does not have.

Such a row is read by none of the expert's texts, so that any value does; the one that changes nothing in the mean is
what the experts that do have the token say of it, in this expert's units.
"""

from __future__ import annotations

import torch

from hf_zipit.maps.space_map import Alignment
from hf_zipit.maps.transform import to_merged, unmerge_matrix
from hf_zipit.planning.plan import Plan


@torch.no_grad()
def share_rows(planned: Plan, maps: Alignment) -> None:
    """Write the rows that experts lack into their embeddings: the mean of the others', through M_t and U_t.

    Nothing happens where all experts have all tokens, or the embedding is not in the trunk.
    """
    held = [getattr(model, "held_rows", None) for model in planned.experts.values()]
    if any(rows is None for rows in held):
        return
    tables = [model.get_input_embeddings().weight for model in planned.folded.values()]
    name = next(name for name, parameter in planned.model.named_parameters() if parameter is tables[0])
    if name not in planned.cut.trunk:
        return
    spec, labels = planned.spec, planned.spec.axes[name]
    moved = [to_merged(table.double(), labels, maps, spec, i) for i, table in enumerate(tables)]
    shares = [rows.double()[:, None] for rows in held]
    mean = sum(s * m for s, m in zip(shares, moved, strict=True)) / sum(shares).clamp_min(1)
    for number, (table, rows) in enumerate(zip(tables, held, strict=True)):
        table[~rows] = (mean[~rows] @ unmerge_matrix(maps, labels[1], number, spec).T).to(table)
