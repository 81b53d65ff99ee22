"""Checkpoints of somebody else: their configuration, the class that it names, their weights.

Experts, bases of adapters and merged models are all read through here.

Invariants: no code that came with the weights runs, no pickle is read, and no file outside the folder; what was read
is a checkpoint whose every tensor belongs to its class.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from hf_zipit.errors import ExpertError
from hf_zipit.files.places import folder_of

os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # transformers would ask a server to convert a pickle

PLAIN = {"trust_remote_code": False, "use_safetensors": True}
"""Arguments of `from_pretrained` by which loading runs no code that came with the weights."""

SLACK = 10_000_000
"""So many parameters may be missing without being told before anything is made: they are told by name afterwards."""

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_config(source: str, revision: str | None = None) -> PreTrainedConfig:
    """The configuration of a model in a folder or repo, which cannot name code that is fetched and run.

    Raises ExpertError for quantised weights, which cannot be averaged.
    """
    config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    if "/" in str(getattr(config, "_attn_implementation", None)):  # a repo of kernels
        config._attn_implementation = None
    if (quantised := getattr(config, "quantization_config", None)) is not None:
        kind = quantised.get("quant_method") if isinstance(quantised, Mapping) else type(quantised).__name__
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
    return model_class.from_pretrained(
        source, config=config, revision=revision, output_loading_info=True, **PLAIN, **loading,
        ignore_mismatched_sizes=True,  # `damage` tells them by name
    )  # fmt: skip


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


def check_size(model_class: Any, folder: Path, config: PreTrainedConfig) -> None:
    """Raises ExpertError if a configuration makes many more parameters than a folder's weights have bytes.

    They would be made before it turns out that they are missing: an odd number could take all memory.
    """
    build = getattr(model_class, "from_config", None) or model_class._from_config  # of Auto classes, of models
    with torch.device("meta"), no_init_weights():
        made = sum(parameter.numel() for parameter in build(copy.deepcopy(config)).parameters())
    held = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    if held and made > held + SLACK:
        raise ExpertError(
            f"the configuration in {folder} makes {made:,} parameters, but its weights are only {held:,} bytes; save "
            "the model again from where it is whole"
        )


def damage(found: Mapping[str, Any]) -> str | None:
    """What is wrong with a checkpoint, of the loading info of `from_pretrained`; None where every tensor was found."""
    kinds = {
        "missing_keys": "lacks {}",
        "unexpected_keys": "has {}, which its class does not know",
        "mismatched_keys": "has another shape than its configuration says in {}",
    }
    for kind, text in kinds.items():
        names = sorted(str(key[0]) if isinstance(key, tuple) else str(key) for key in found.get(kind) or ())
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            return text.format(f"the tensor {names[0]}{more}")
    return None
