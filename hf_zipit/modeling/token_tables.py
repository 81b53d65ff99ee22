"""Token tables of a merged model made longer or shorter: the embedding of the trunk, and the head of every branch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from .trunk import Shared, write_down_sizes

COPIES = "embed_tokens"
"""How the classes of `transformers` call further tables of the same tokens."""


def resize_tables(merged: PreTrainedModel, branches: Sequence[nn.Module], count: int, mean_resizing: bool) -> None:
    """Make every table have `count` rows, new ones as transformers initialises them.

    `merged` knows how a table is resized, `branches` are models of the source class.
    """
    first = _embedding(branches[0])
    before = len(first.weight)
    # Nothing is tied in a merged model: encoder and decoder have tables of their own.
    copies = [
        m for name, m in merged.named_modules() if name.endswith(COPIES) and len(getattr(m, "weight", ())) == before
    ]
    for table in {id(table): table for table in (*map(_embedding, branches), *copies)}.values():
        new: Any = merged._get_resized_embeddings(table, count, mean_resizing=mean_resizing)
        table.weight = new.weight
        write_down_sizes(table)
    for branch in branches:
        head = branch.get_output_embeddings()
        if head is not None:
            new = merged._get_resized_lm_head(head, count, mean_resizing=mean_resizing)
            head.weight, head.bias = new.weight, new.bias
            write_down_sizes(head)
        for module in branch.modules():  # biases that stand beside a head (BERT's, BART's)
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if module is not head and name.endswith("bias") and tensor.shape[-1] == before:
                    longer = functional.pad(tensor.detach(), (0, count - before))
                    setattr(module, name, nn.Parameter(longer) if isinstance(tensor, nn.Parameter) else longer)


def _embedding(branch: nn.Module) -> nn.Module:
    table = branch.get_input_embeddings()
    return table.target if isinstance(table, Shared) else table
