"""Checkpoints of somebody else: their configuration, the class that it names, their weights.

Experts, bases of adapters and merged models are all read through here.

Invariants: no code that came with the weights runs, no pickle is read, and no file outside the folder; what was read
is a checkpoint whose every tensor belongs to its class.
"""

from __future__ import annotations

import copy
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

import torch
import torch.nn.modules.module as registration
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from hf_zipit.errors import ExpertError
from hf_zipit.files.places import folder_of
from hf_zipit.files.tensors import dtypes
from hf_zipit.hub.cache import local_folder

os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # transformers would ask a server to convert a pickle

PLAIN = {"trust_remote_code": False, "use_safetensors": True}
"""Arguments of `from_pretrained` by which loading runs no code that came with the weights."""

SLACK = 10_000_000
"""So many parameters may be missing without being told before anything is made: they are told by name afterwards."""

MODULE = 1_000
"""So many parameters a module counts for, which may have none and yet takes memory."""

BUFFERS = 2**30
"""Bytes that the buffers may have above those of the weights: tables that are computed are in no file."""

MOST = 1_000_000
"""So many layers, heads, experts, labels ... no model has."""

REPEATED = re.compile("layer|depth|block|stage|label|expert|head|group")
"""Keys of a configuration whose numbers say how often something is made; some are made with the configuration."""

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_config(source: str, revision: str | None = None, *, quantised: bool = False) -> PreTrainedConfig:
    """The configuration of a model in a folder or repo, which cannot name code that is fetched and run.

    Raises ExpertError for numbers that would take all memory, and for quantised weights, unless `quantised` ones will
    do.
    """
    check_numbers(PreTrainedConfig.get_config_dict(source, revision=revision)[0], source)
    config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    if "/" in str(getattr(config, "_attn_implementation", None)):  # a repo of kernels
        config._attn_implementation = None
    if not quantised and (found := getattr(config, "quantization_config", None)) is not None:
        kind = found.get("quant_method") if isinstance(found, Mapping) else type(found).__name__
        raise ExpertError(
            f"the weights in {source} are quantised ({kind}); save what `model.dequantize()` gives, and merge that"
        )
    return config


def class_of(
    config: PreTrainedConfig, whose: str, home: ModuleType = transformers, named: object = None
) -> type[PreTrainedModel]:
    """The class that a configuration names under `architectures`, or that is `named`, of transformers or a `home`.

    Raises ExpertError, which begins with `whose`, if there is no such class, or it is one of another kind of model.
    """
    listed = config.architectures
    name = named or (listed[0] if isinstance(listed, (list, tuple)) and listed else listed)
    found = getattr(home, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel) and found.config_class):
        raise ExpertError(
            f"{whose} names {'no class' if not name else f'the class {name!r}'}, but should name a model of "
            "transformers; load the model yourself and pass it"
        )
    if not isinstance(config, found.config_class):
        raise ExpertError(
            f"{whose} is of type {config.model_type!r}, but names the class {name}, which is made of a "
            f"{found.config_class.__name__}; one of the two is wrong, so save the model again from where it is whole"
        )
    return found


def read_weights(
    model_class: Any, source: str, config: PreTrainedConfig, revision: str | None = None, **loading: Any
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """A model, and what `from_pretrained` tells of its tensors: see `damage`. `loading` are more of its arguments.

    Raises ExpertError if the folder's index of shards is odd or leads out of the folder, or its weights are far too
    few for the configuration.
    """
    if folder := folder_of(source):
        check_index(folder, getattr(config, "transformers_weights", None))
        check_size(model_class, folder, config)
    model, found = model_class.from_pretrained(
        source, config=config, revision=revision, output_loading_info=True, **PLAIN, **loading,
        ignore_mismatched_sizes=True,  # `damage` tells them by name
    )  # fmt: skip
    stored = local_folder(source, revision)
    return model, {**found, "unreal_keys": unreal_weights(model, stored) if stored else []}


def unreal_weights(model: nn.Module, folder: Path) -> list[str]:
    """The names of parameters for which a folder's files have no real numbers: integers, truth values, complex ones.

    They are told by the last part of their names, for the parts before it may be others in a file.
    """
    parameters = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
    buffers = {name.rpartition(".")[2] for name, _ in model.named_buffers()}
    kinds = dtypes(folder)
    return [name for name, kind in kinds if "F" not in kind and name.rpartition(".")[2] in parameters - buffers]


def check_index(folder: Path, pointer: object = None) -> None:
    """Raises ExpertError unless the index of a folder's shards, where it has one, says which files in it hold what.

    `pointer` is the file that the configuration names instead of the usual ones.
    """
    path = folder / str(pointer) if pointer else folder / INDEX
    if not path.name.endswith(".index.json") or not path.is_file() or (not pointer and (folder / WEIGHTS).is_file()):
        return
    content = json.loads(path.read_text(encoding="utf-8"))
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not shards or not isinstance(content.get("metadata"), dict):
        raise ExpertError(f"{path} has no weight_map and metadata, as an index of shards has; save the model again")
    for shard in shards.values():
        if not isinstance(shard, str) or PurePosixPath(shard).is_absolute() or ".." in PurePosixPath(shard).parts:
            raise ExpertError(
                f"{path} names the shard {shard!r}, which is no file in its folder; save the model again"
            )


def check_numbers(content: object, source: str, key: str = "") -> None:
    """Raises ExpertError if a configuration, as it is in its file, asks for absurdly many of something."""
    if isinstance(content, Mapping):
        for name, value in content.items():
            check_numbers(value, source, str(name))
    elif isinstance(content, list):
        for value in content:
            check_numbers(value, source, key)
    elif isinstance(content, (int, float)) and REPEATED.search(key) and content > MOST:
        raise ExpertError(
            f"the configuration in {source} has {key} {content:.9g}, more than any model; save the model again from "
            "where it is whole"
        )


def check_size(model_class: Any, folder: Path, config: PreTrainedConfig) -> None:
    """Raises ExpertError if a configuration makes far more than a folder's weights have bytes.

    It would be made before it turns out that it is missing: an odd number could take all memory. Nothing is made
    here, and no more than the weights could fill is counted.
    """
    held = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    if not held:
        return
    build = getattr(model_class, "from_config", None) or model_class._from_config  # of Auto classes, of models
    with suppress(_TooLargeError), torch.device("meta"), no_init_weights(), counted(held) as excess:
        build(copy.deepcopy(config))
    if excess:
        raise ExpertError(
            f"the configuration in {folder} makes more than {excess[0]}, but its weights are only {held:,} bytes; "
            "save the model again from where it is whole"
        )


class _TooLargeError(Exception):
    """Ends the making of a model."""


@contextmanager
def counted(held: int) -> Iterator[list[str]]:
    """What the modules that this thread makes have too much of for so many bytes of weights, in words.

    Making them ends there, by a `_TooLargeError`.
    """
    limits = held + SLACK, held + BUFFERS
    made, excess, maker = [0, 0], [], threading.get_ident()

    def count(module: nn.Module, name: str, added: object) -> None:
        if threading.get_ident() != maker or added is None:
            return
        if isinstance(added, nn.Module):
            made[0] += MODULE
        elif isinstance(added, nn.Parameter):
            made[0] += added.numel()
        elif isinstance(added, torch.Tensor):
            made[1] += added.nbytes
        for number, most, what in zip(made, limits, ("parameters", "bytes of buffers"), strict=True):
            if number > most:
                excess.append(f"{most:,} {what}")
                raise _TooLargeError

    kinds = ("module", "parameter", "buffer")
    handles = [getattr(registration, f"register_module_{kind}_registration_hook")(count) for kind in kinds]
    try:
        yield excess
    finally:
        for handle in handles:
            handle.remove()
