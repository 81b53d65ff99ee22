"""The experts, loaded where they are given by name."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from hf_zipit import modeling
from hf_zipit.errors import ExpertError
from hf_zipit.experts.adapted import adapter_config, is_adapted, load_adapted, plain
from hf_zipit.experts.offloaded import is_placed, plain_copy
from hf_zipit.files import recover
from hf_zipit.files.checks import unprintable
from hf_zipit.files.tensors import half_precision
from hf_zipit.hub.cache import commit_of, local_folder, looks_local
from hf_zipit.hub.processors import processor_files
from hf_zipit.hub.reasons import told
from hf_zipit.modeling import ZipItConfig, ZipItPreTrainedModel

Expert = PreTrainedModel | nn.Module | str | Path

os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # transformers would ask a server to convert a pickle

PLAIN = {"trust_remote_code": False, "use_safetensors": True}
"""Arguments of `from_pretrained` by which loading runs no code that came with the weights."""

Experts = Mapping[str, Expert] | Iterable[tuple[str, Expert]] | Iterable[Expert]
"""By task; without names, an expert is named like its folder or repo."""


def load_experts(
    experts: Experts, *, revisions: Mapping[str, str] | None = None, as_stored: bool = False
) -> dict[str, PreTrainedModel]:
    """The experts by task name: repo ids and folders loaded in float32 and eval mode, models as they are.

    `as_stored`: folders and repos whose weights are in half precision are left in it. Their tensors are then the pages
    of their files (as those of float32 are anyway), which the system reads when they are used and may forget again.

    A LoRA adapter becomes the model that it makes of its base. A merged model becomes several experts, one for each of
    its tasks, named `NAME/TASK`.

    Raises:
        ExpertError: for fewer than two experts, an empty or repeated task name, or a model that cannot be loaded.
    """
    pairs = list(experts.items() if isinstance(experts, Mapping) else map(named, experts))
    names = [name for name, _ in pairs]
    if not pairs:
        raise ExpertError("merging needs at least two experts, but none was given")
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise ExpertError(f"the task name {name!r} is empty; give every expert the name of its task")
        if wrong := unprintable(name):
            raise ExpertError(f"the task name {name[:80]!r} {wrong}; give the expert another name")
        if (count := names.count(name)) > 1:
            raise ExpertError(f"the task name {name!r} is given to {count} experts; task names must differ")
    found: dict[str, PreTrainedModel] = {}
    for name, expert in pairs:
        loaded = load_expert(name, expert, (revisions or {}).get(name), as_stored)
        parts = by_task(name, loaded) if isinstance(loaded, ZipItPreTrainedModel) else {name: loaded}
        if twice := next((task for task in parts if task in found), None):
            raise ExpertError(f"the task name {twice!r} is given to 2 experts; task names must differ")
        found |= parts
    if len(found) < 2:
        raise ExpertError(f"merging needs at least two experts, but only {names[0]!r} was given")
    return found


def named(expert: Expert | tuple[str, Expert]) -> tuple[str, Expert]:
    """An expert with its name: the one that it has, else the last part of its folder or repo id.

    Raises ExpertError where there is none.
    """
    if not isinstance(expert, (str, Path, nn.Module)):
        return expert
    source = getattr(expert, "name_or_path", "") if isinstance(expert, nn.Module) else expert
    if not (name := Path(str(source)).expanduser().name):
        raise ExpertError(
            f"a {type(expert).__name__} that was not loaded from a folder or repo has no name; name the experts' "
            "tasks: merge({'clothes': model_a, 'shoes': model_b}, ...)"
        )
    return name, expert


def load_bases(
    base: Any, experts: Mapping[str, PreTrainedModel], *, as_stored: bool = False
) -> dict[str, PreTrainedModel]:
    """By task the model that each expert started from; empty where none is given.

    It is one model for all experts, or one for each by task: loaded, or a repo id or folder, which is loaded with the
    experts' class. A head that it lacks is left as it is initialised, for heads are never merged. `as_stored` is as
    for `load_experts`.

    Raises:
        ExpertError: a base cannot be loaded, or there is not one for every expert.
    """
    if base is None:
        return {}
    given = dict(base) if isinstance(base, Mapping) else dict.fromkeys(experts, base)
    if set(given) != set(experts):
        raise ExpertError(f"base= names {sorted(given)}, but the experts are {sorted(experts)}; give one for each")
    loaded: dict[Any, PreTrainedModel] = {}  # a module is its own key
    for task, source in given.items():
        if source not in loaded:
            loaded[source] = _load_base(task, source, experts[task], as_stored)
    return {task: loaded[source] for task, source in given.items()}


def _load_base(task: str, source: Any, expert: PreTrainedModel, as_stored: bool) -> PreTrainedModel:
    if isinstance(source, nn.Module):
        return as_expert(task, source).eval()
    what = f"the base of {task!r} could not be loaded from {source}"
    loading = {"config": expert.config, "ignore_mismatched_sizes": True}
    with torch.random.fork_rng(devices=[]), told(what, str(source)):  # a head that is missing is initialised
        return _from_files(type(expert), str(source), as_stored, **loading).eval()


def by_task(name: str, merged: ZipItPreTrainedModel) -> dict[str, PreTrainedModel]:
    """The tasks of a merged model as experts of their own, `NAME/TASK`.

    Raises ExpertError if a task cannot be a plain model.
    """
    try:
        return {f"{name}/{task}": merged.expert(task) for task in merged.config.tasks}
    except ExpertError as error:
        raise ExpertError(f"the expert {name!r} is a merged model that cannot be merged again: {error}") from error


def load_expert(task: str, expert: Expert, revision: str | None = None, as_stored: bool = False) -> PreTrainedModel:
    """One expert; a repo id or a folder is loaded in float32 with the class that its configuration names.

    `as_stored` is as for `load_experts`.

    With a repo id its image processor or tokenizer and its card come along into the cache, for the merged model's.
    Raises ExpertError if it cannot be loaded, in one sentence that says why.
    """
    if isinstance(expert, nn.Module):
        return as_expert(task, expert)
    source = str(expert)
    folder = Path(source).expanduser()
    if (isinstance(expert, Path) or looks_local(source)) and not folder.is_dir():
        raise ExpertError(f"the expert {task!r} is to come from the folder {source}, which does not exist")
    source = str(folder) if folder.is_dir() else source
    recover(folder)
    with told(f"the expert {task!r} could not be loaded from {source}", source, revision):
        settings = adapter_config(source, revision)
        model = (
            load_adapted(task, source, settings, revision) if settings else _load(task, source, revision, as_stored)
        )
    if not folder.is_dir():
        commit = commit_of(source, revision or "main")
        processor_files(source, commit, fetch=True)
        model.config._commit_hash = commit
    return model.eval()


def as_expert(task: str, model: nn.Module) -> PreTrainedModel:
    """A loaded model as an expert: itself without hooks that place it, or what an adapter makes of its base."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ExpertError(
            f"the expert {task!r} is wrapped in {type(model).__name__}; give what is in it, model.module"
        )
    if is_placed(model):
        model = plain_copy(model)
    if empty := next((n for n, p in model.named_parameters() if p.is_meta), None):
        raise ExpertError(
            f"the tensor {empty} of the expert {task!r} has no values (device meta); load its weights first"
        )
    if is_adapted(model):
        return plain(task, model)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ExpertError(
            f"the expert {task!r} carries adapters beside its weights; give the adapter's folder or repo id instead, "
            "or a PeftModel"
        )
    return model  # type: ignore[return-value]


def _load(task: str, source: str, revision: str | None, as_stored: bool) -> PreTrainedModel:
    config = read_config(source, revision)
    architecture = str((config.architectures or [""])[0] or "")
    model_class = getattr(modeling if isinstance(config, ZipItConfig) else transformers, architecture, None)
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise ExpertError(
            f"the configuration of the expert {task!r} ({source}) names the class {architecture or 'nothing'!r}, "
            "which transformers does not have; load the model yourself and pass it"
        )
    model, found = _from_files(
        model_class, source, as_stored, config=config, revision=revision, output_loading_info=True,
        ignore_mismatched_sizes=True,  # told below, by name
    )  # fmt: skip
    if wrong := damage(found):
        raise ExpertError(
            f"the expert {task!r} is damaged: {source} {wrong}, so that it would not compute what was trained; "
            "save it again from where it is whole"
        )
    return model


def _from_files(model_class: type[PreTrainedModel], source: str, as_stored: bool, **loading: Any) -> Any:
    """What `from_pretrained` gives, in float32; `as_stored` in the half precision that all of its files have."""
    load = partial(model_class.from_pretrained, source, **PLAIN, **loading)
    revision = loading.get("revision")
    if as_stored and local_folder(source, revision) is None:
        load(dtype="auto")  # brings the files of a repo here
    folder = local_folder(source, revision) if as_stored else None
    return load(dtype=(half_precision(folder) if folder else None) or torch.float32)


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
