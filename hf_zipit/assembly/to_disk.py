"""A merged model written as it is made: tensor by tensor, straight into its files, for models larger than memory.

The experts' tensors are pages of their files, the merged model's shapes are known from a model on the meta device, and
every merged tensor is made when its place in the file has come. So no more is held than one tensor of each expert and
of the merged model, of elementwise rules only a part of it.

Invariants: the files are, byte for byte, those of the same merge made in memory and saved; they appear at once, when
all are complete.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import PreTrainedModel

from hf_zipit.assembly.assemble import MergedTensors, configured
from hf_zipit.assembly.record import record
from hf_zipit.combine.combine import CombinedTrunk
from hf_zipit.files import adding_to
from hf_zipit.files.tensors import write_tensors
from hf_zipit.maps.space_map import Alignment
from hf_zipit.modeling import ZipItPreTrainedModel, build
from hf_zipit.planning.plan import Plan

SHARD = "50GB"
"""Largest size of a file with weights: that of transformers' `save_pretrained`."""


def write_merged(planned: Plan, maps: Alignment, folder: str | Path, *, processor: Any = None) -> ZipItPreTrainedModel:
    """The merged model of a merge without data, saved in a folder; its tensors are the pages of its files there.

    Args:
        planned, maps: of the merge.
        folder: for the model; see `files.adding_to`.
        processor: as for `record`.

    Raises:
        SpecError, ExpertError: as `CombinedTrunk` and `MergedTensors` do.
        OutputError: the folder cannot be written, or the disk is full.
    """
    trunk = CombinedTrunk(planned, maps)
    with torch.device("meta"):
        empty = build(configured(planned, trunk.shapes, maps))
    with adding_to(folder) as beside:
        write_shards(beside, empty, MergedTensors(planned, trunk, maps, empty).pieces, SHARD)
        empty.write_configuration(beside)
        merged = type(empty).from_pretrained(beside, dtype=torch.float32)
        merged.name_or_path, merged.config = str(folder), empty.config  # loading writes into a configuration
        record(merged.eval(), planned, None, None, processor)
        merged.write_about(beside, Path(folder).absolute().name)
    return merged


@torch.no_grad()
def write_shards(
    folder: Path, empty: PreTrainedModel, pieces: Callable[[str], Iterable[Tensor]], shard: str | int
) -> None:
    """Write a model's weights under the names of transformers, one file or several with an index.

    Args:
        folder: where to.
        empty: a model of the same tensors without values.
        pieces: gives its tensors by name, each in pieces whose entries follow each other.
        shard: largest size of a file.
    """
    state = empty.state_dict()
    split = split_torch_state_dict_into_shards(
        state, filename_pattern="model{suffix}.safetensors", max_shard_size=shard
    )
    for file, names in split.filename_to_tensors.items():
        write_tensors(folder / file, {name: state[name] for name in names}, pieces)
    if split.is_sharded:
        about = {"total_parameters": empty.num_parameters(), **split.metadata}
        index = {"metadata": about, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
