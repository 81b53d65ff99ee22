"""The image processor or tokenizer that belongs to a merged model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from hf_zipit.experts.origins import source_of
from hf_zipit.hub.processors import Files, own_files, processor_files, saved_files, together
from hf_zipit.modeling import module_names


def processors_of(experts: Mapping[str, nn.Module], folders: Mapping[str, str], processor: Any = None) -> Files:
    """The files of the processor that belongs to a merged model: the one that was given, or the experts' own."""
    if given := saved_files(processor):
        return given
    return together({task: files_of(model) for task, model in experts.items()}, folders)


def files_of(model: nn.Module) -> Files:
    """The files of a loaded expert's own processor, as far as they are on this machine."""
    if (known := getattr(model, "known_processor_files", None)) is not None:
        return known
    files, part = processor_files(*source_of(model)), getattr(model, "merged_task", None)
    return files if part is None else own_files(files, module_names([part])[part])
