"""The experts, loaded where they are given by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_zipit import modeling
from hf_zipit.errors import ExpertError
from hf_zipit.experts.adapted import adapter_config, is_adapted, load_adapted, plain
from hf_zipit.experts.checkpoints import class_of, read_config, read_weights
from hf_zipit.experts.offloaded import is_placed, plain_copy
from hf_zipit.experts.quantised import dequantised, kind_of, load_dequantised
from hf_zipit.files import recover
from hf_zipit.files.checks import unprintable
from hf_zipit.files.places import folder_of
from hf_zipit.files.tensors import damage, half_precision
from hf_zipit.hub.cache import commit_of, inner_folder, local_folder, looks_local, taken_apart
from hf_zipit.hub.processors import processor_files
from hf_zipit.hub.reasons import told
from hf_zipit.modeling import ZipItConfig, ZipItPreTrainedModel

Expert = PreTrainedModel | nn.Module | str | Path

QUANTISED = ("torch.ao.nn.quantized", "torch.nn.quantized")
"""Where the modules live that torch's own quantisation makes."""

Experts = Mapping[str, Expert] | Iterable[tuple[str, Expert]] | Iterable[Expert]
"""By task; without names, an expert is named like its folder or repo."""


def load_experts(
    experts: Experts, *, revisions: Mapping[str, str] | None = None, least: int = 2, as_stored: bool = False
) -> dict[str, PreTrainedModel]:
    """The experts by task name: repo ids and folders loaded in float32 and eval mode, models as they are.

    `as_stored`: folders and repos whose weights are in half precision are left in it. Their tensors are then the pages
    of their files (as those of float32 are anyway), which the system reads when they are used and may forget again.

    A LoRA adapter becomes the model that it makes of its base. A merged model becomes several experts, one for each of
    its tasks, named `NAME/TASK`.

    Raises:
        ExpertError: for fewer experts than `least`, an empty or repeated task name, or a model that cannot be loaded.
    """
    if isinstance(experts, (str, nn.Module)) or not isinstance(experts, Iterable):
        raise ExpertError(
            f"the experts are given as {type(experts).__name__}; give a mapping of task names to models, repo ids or "
            "folders, or a list of them"
        )
    pairs = list(experts.items() if isinstance(experts, Mapping) else map(named, experts))
    names = [name for name, _ in pairs]
    if not pairs:
        raise ExpertError("merging needs at least two experts, but none was given")
    for name in names:
        if not isinstance(name, str) or not name.strip():
            wrong = "empty" if isinstance(name, str) else "no text"
            raise ExpertError(f"the task name {name!r} is {wrong}; give every expert the name of its task")
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
    if len(found) < least:
        raise ExpertError(f"merging needs at least two experts, but only {names[0]!r} was given")
    return found


def named(expert: Expert | tuple[str, Expert]) -> tuple[str, Expert]:
    """An expert with its name: the one that it has, else the last part of its folder or repo id.

    Raises ExpertError where there is none.
    """
    if isinstance(expert, tuple) and len(expert) == 2:
        return expert
    check_kind("", expert)
    source = getattr(expert, "name_or_path", "") if isinstance(expert, nn.Module) else expert
    if not (name := task_name(str(source))):
        raise ExpertError(
            f"a {type(expert).__name__} that was not loaded from a folder or repo has no name; name the experts' "
            "tasks: merge({'clothes': model_a, 'shoes': model_b}, ...)"
        )
    return name, expert


def task_name(source: str) -> str:
    """What an expert is called that nobody named: the last part of its folder or repo id."""
    repo, _, inner = taken_apart(source)
    return Path(inner or repo).name


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
    with torch.random.fork_rng(devices=[]), told(what, str(source)):  # a head that is missing is initialised
        return _read(type(expert), str(source), expert.config, None, as_stored)[0].eval()


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

    A repo id may name a revision and a folder in the repo, `user/name@v2/checkpoint`. Its image processor or tokenizer
    and its card come along into the cache, for the merged model's.

    Raises ExpertError if it cannot be loaded, in one sentence that says why.
    """
    check_kind(f" {task!r}", expert)
    if isinstance(expert, nn.Module):
        return as_expert(task, expert)
    source = str(expert)
    source, named_revision, inner = taken_apart(source)
    revision = revision or named_revision
    folder = folder_of(source)
    if (isinstance(expert, Path) or looks_local(source)) and not folder:
        raise ExpertError(f"the expert {task!r} is to come from the folder {source}, which does not exist")
    if folder:
        recover(folder)
        source = str(folder)
    repo, commit = source, None
    with told(f"the expert {task!r} could not be loaded from {expert}", source, revision):
        if inner:
            inside, commit = inner_folder(repo, revision, inner)
            source, revision = str(inside), None
        settings = adapter_config(source, revision)
        model = (
            load_adapted(task, source, settings, revision) if settings else _load(task, source, revision, as_stored)
        )
    if inner:
        model.known_origin = repo, commit, inner
    elif not folder:
        commit = commit_of(source, revision or "main")
        processor_files(source, commit, fetch=True)
        model.config._commit_hash = commit
    return model.eval()


def check_kind(which: str, expert: object) -> None:
    """Raises ExpertError for what is no model of transformers, and does not name one."""
    if not isinstance(expert, (str, Path, nn.Module)):
        raise ExpertError(
            f"the expert{which} is of type {type(expert).__name__}; give a loaded model, a repo id or a folder"
        )


def as_expert(task: str, model: nn.Module) -> PreTrainedModel:
    """A loaded model as an expert: itself without hooks that place it, or what an adapter makes of its base."""
    compiled = hasattr(model, "_orig_mod")
    if compiled or isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        inside = "_orig_mod" if compiled else "module"
        raise ExpertError(
            f"the expert {task!r} is wrapped in {type(model).__name__}; give what is in it, model.{inside}"
        )
    if quantised := next((n for n, m in model.named_modules() if type(m).__module__.startswith(QUANTISED)), None):
        raise ExpertError(
            f"the module {quantised} of the expert {task!r} is quantised; give the model from before it was"
        )
    if is_placed(model):
        model = plain_copy(model)
    if empty := next((n for n, p in model.named_parameters() if p.is_meta), None):
        raise ExpertError(
            f"the tensor {empty} of the expert {task!r} has no values (device meta); load its weights first"
        )
    if sparse := next((n for n, p in model.named_parameters() if p.layout != torch.strided), None):
        raise ExpertError(f"the tensor {sparse} of the expert {task!r} is sparse; give it dense, by tensor.to_dense()")
    if is_adapted(model):
        return plain(task, model)
    model = dequantised(task, model)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ExpertError(
            f"the expert {task!r} carries adapters beside its weights; give the adapter's folder or repo id instead, "
            "or a PeftModel"
        )
    return model  # type: ignore[return-value]


def _load(task: str, source: str, revision: str | None, as_stored: bool) -> PreTrainedModel:
    config = read_config(source, revision, quantised=True)
    home = modeling if isinstance(config, ZipItConfig) else transformers
    model_class = class_of(config, f"the configuration of the expert {task!r} ({source})", home)
    if kind_of(config):
        model, found = load_dequantised(model_class, source, config, revision)
    else:
        model, found = _read(model_class, source, config, revision, as_stored)
    if wrong := damage(found):
        raise ExpertError(
            f"the expert {task!r} is damaged: {source} {wrong}, so that it would not compute what was trained; "
            "save it again from where it is whole"
        )
    return model


def _read(
    model_class: type[PreTrainedModel], source: str, config: PreTrainedConfig, revision: str | None, as_stored: bool
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """What `read_weights` gives, in float32; `as_stored` in the half precision that all of its files have."""
    if as_stored and local_folder(source, revision) is None:
        read_weights(model_class, source, config, revision, dtype="auto")  # brings the files of a repo here
    folder = local_folder(source, revision) if as_stored else None
    dtype = (half_precision(folder) if folder else None) or torch.float32
    return read_weights(model_class, source, config, revision, dtype=dtype)
