"""The configuration of a merged multi-head model: everything but the tensors.

It wraps the experts' own configuration (`source_config`) and adds what merging decided: the tasks and their labels,
the modules that all tasks share, where the branches read the trunk, and the trunk's sizes where they differ from the
source's.

Invariants: a configuration that is written to JSON and read again builds the same model.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

try:
    from transformers.configuration_utils import SubConfigSpec
except ImportError:  # transformers up to 5.17 builds no configuration inside another
    SubConfigSpec = None  # type: ignore[assignment,misc]

from ..errors import ZipItError
from ..files.known import without_secrets
from ..registry import suggestion
from ..schema import packed, unpacked

Labels = dict[int, str]

SHOWN = (
    "method",
    "options",
    "overrides",
    "combine",
    "combine_options",
    "refit",
    "corrections",
    "root",
    "polish",
    "residues",
    "seed",
)
"""Of the record of a merge, what `repr` tells; `to_dict` has all of it."""

BY_LAYER = ("trunk_shapes", "head_dims", "rotary_pairs", "rescaled", "residues", "mixtures")
"""Fields that say how modules are built, layer by layer: a line each in the file, however many layers there are. Maps
of units are tensors, and stand with the others in the safetensors file."""


@strict
class ZipItConfig(PreTrainedConfig):
    """Configuration of a `ZipItModel`.

    Args:
        source_architecture: the experts' class in `transformers`, such as `"ViTForImageClassification"`.
        source_config: the experts' configuration; its labels are replaced by each task's own.
        tasks: the tasks' names, in the order of their classes in the joint logits.
        task_labels: for every task the names of its own classes, by id. Empty where the source class has no labels.
        shared: paths of the modules that run once for all tasks, as maximal subtrees of the source model
            (`["vit.embeddings", "vit.layers.0"]`); `[""]` is the whole model, `[]` nothing.
        entries: where the branches read the trunk. Each is `{"module": path in the source model, "axis": int,
            "units": d, "size": k, "kind": "index" | "dense"}`: the module's first argument has k merged units along
            `axis`, the branch wants its own d.
        exits: the same for outputs that leave the trunk without passing a branch: `"field"` (dotted for nested
            outputs) instead of `"module"`.
        rescaled: sites in the trunk with a correction per task (see `rescale.py`): `{"module": path in the source,
            "where": "input" | "output", "axis": int, "size": k}`. With None nothing is corrected; with a list, entries
            and exits are, too.
        residues: what tasks add to tensors while they run alone (see `residues.py`): `{"task": str, "tensor": name in
            the trunk, "shape": list, "kind": str, "size": planes, rank, ...}`; of task None what all tasks share.
        router: what finds the task of a sample (see `router.py`): `{"module": name in the trunk, "size": int}`; None:
            nothing does.
        gates: what gives every token the residues of some tasks (see `gates.py`): `{"top": so many at most, "layers":
            [{"module": name in the trunk, "rank": int, "units": int}]}`; None: nothing does.
        mixtures: MLPs of the trunk whose task vectors are weighed for every sample (see `mixtures.py`): `{"layers":
            [name in the trunk], "hidden": units of the router, "rank": of the task vectors, 0 for whole ones}`.
        surgery: networks that correct a task's features (see `surgery.py`): `{"rank": int, "sites": [{"module": path
            in the source, "axis": int, "size": k}]}`, the sites in the trunk; entries and exits have one each.
        trunk_shapes: shapes of trunk tensors, by name in the source model, that differ from the source's.
        head_dims: the width of a head in the trunk's attention layers that have more and narrower heads than the
            source's, by the layer's path in the source model.
        rotary_pairs: which of the source's rotary pairs these heads have, for layers with a rotary embedding.
        output_bias: whether the logits of tokens have a bias, one for each task, that the source class does not give
            them: with one vocabulary for several tokenizers it rules out what a task's expert has no token for.
        depth: the share of blocks in the trunk, if known.
        cut: the path of the first block outside the trunk, if any.
        method: how the model was made, free-form.
        joint: how the joint logits come from the tasks': `"concatenate"` them, or `"vote"` (log of the mean
            probability) when all tasks have the very same classes. Chosen from the labels when not given.
        task: the task that the model answers for when its caller names none; None is all of them, jointly.
        joint_names: what callers may say in place of a task without meaning one.
    """

    model_type: ClassVar[str] = "zipit"
    if SubConfigSpec is None:
        sub_configs: ClassVar[dict[str, type]] = {"source_config": AutoConfig}
    else:
        sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
            # The model type is only what SubConfigSpec asks for as a fallback; a saved source_config always names its
            # own.
            "source_config": SubConfigSpec(config_class=AutoConfig, model_type="vit", optional=True)
        }
    # Head and embeddings belong to different parts (branch and trunk) and differ in value: nothing is ever tied.
    tie_word_embeddings: bool = False

    source_architecture: str | None = None
    source_config: dict[str, Any] | PreTrainedConfig | None = None
    tasks: list[str] | tuple[str, ...] = ()
    task_labels: dict[str, Any] | None = None
    shared: list[str] | tuple[str, ...] = ()
    entries: list[dict[str, Any]] | tuple[dict[str, Any], ...] = ()
    exits: list[dict[str, Any]] | tuple[dict[str, Any], ...] = ()
    rescaled: list[dict[str, Any]] | tuple[dict[str, Any], ...] | str | None = None
    residues: list[dict[str, Any]] | tuple[dict[str, Any], ...] | str = ()
    router: dict[str, Any] | None = None
    gates: dict[str, Any] | None = None
    mixtures: list[dict[str, Any]] | tuple[dict[str, Any], ...] | str = ()
    surgery: dict[str, Any] | None = None
    trunk_shapes: dict[str, list[int]] | str | None = None
    head_dims: dict[str, int] | str | None = None
    rotary_pairs: dict[str, list[int]] | str | None = None
    output_bias: bool = False
    depth: float | None = None
    cut: str | None = None
    method: dict[str, Any] | None = None
    joint: Literal["concatenate", "vote"] | None = None
    task: str | None = None
    joint_names: list[str] | tuple[str, ...] = ()

    def __post_init__(self, **kwargs: Any) -> None:
        # The base class writes into sub-configurations, and this one may belong to an expert that is in use.
        self.source_config = copy.deepcopy(self.source_config)
        if SubConfigSpec is None and isinstance(self.source_config, dict):
            self.source_config = AutoConfig.for_model(**self.source_config)
        for name in BY_LAYER:
            setattr(self, name, unpacked(getattr(self, name)))
        for name in ("tasks", "shared", "entries", "exits", "residues", "mixtures", "joint_names"):
            setattr(self, name, list(getattr(self, name)))
        self.trunk_shapes = dict(self.trunk_shapes or {})
        self.head_dims = dict(self.head_dims or {})
        self.rotary_pairs = dict(self.rotary_pairs or {})
        self.method = dict(self.method or {})
        check_tasks(self.tasks, self.task_labels or {})
        self.task_labels = {  # JSON has no integer keys
            task: {int(key): str(name) for key, name in labels.items()}
            for task, labels in (self.task_labels or {}).items()
        }
        if self.joint is None:
            self.joint = joint_rule(self.tasks, self.task_labels)
        if self.id2label is None and self.task_labels:
            self.answer_for(self.task)
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, without what logs in somewhere, and `BY_LAYER` in a line each."""
        found = without_secrets(super().to_dict())
        return found | {name: packed(found[name]) for name in BY_LAYER if found.get(name)}

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoConfig") -> None:
        """Nothing to do: `save_pretrained` of the models writes what `trust_remote_code` needs (see `hub.py`)."""

    def __repr__(self) -> str:
        """For people: without what a file has to hold but nobody reads, errors of modules and maps of indices."""
        shown = {
            "source": f"{self.source_architecture} ({getattr(self.source_config, 'model_type', 'no configuration')})",
            "tasks": {task: len(self.labels_of(task)) or None for task in self.tasks},
            "joint": self.joint,
            "task": self.task,
            "depth": self.depth,
            "cut": self.cut,
            "shared modules": len(self.shared),
            "entries and exits": len(self.entries) + len(self.exits),
            "method": {name: value for name, value in self.method.items() if name in SHOWN and value},
        }
        lines = (f"  {name}: {value}" for name, value in shown.items() if value not in (None, {}))
        return "\n".join([f"{type(self).__name__}", *lines])

    def answer_for(self, task: str | None) -> None:
        """Make `task` (None: all, jointly) the one that is meant when none is named, and its classes the model's."""
        self.task = task if task is None else self.known(task)
        if self.task_labels:
            joint = joint_labels(self.tasks, self.task_labels, self.joint)
            self.id2label = joint if task is None else dict(self.labels_of(task))
            self.label2id = {name: key for key, name in self.id2label.items()}

    def known(self, task: str) -> str:
        """The task itself; raises ZipItError where there is no such task."""
        if task not in self.tasks:
            raise ZipItError(f"The task '{task}' is unknown; {suggestion(task, self.tasks)}")
        return task

    def labels_of(self, task: str) -> Labels:
        """The task's own classes by id; empty for models without labels."""
        return self.task_labels.get(task, {})

    def offsets(self) -> dict[str, int]:
        """For every task the joint id of its class 0."""
        if self.joint == "vote":
            return dict.fromkeys(self.tasks, 0)
        found, start = {}, 0
        for task in self.tasks:
            found[task] = start
            start += len(self.labels_of(task))
        return found


def check_tasks(tasks: list[str], task_labels: Mapping[str, Any]) -> None:
    """Task names must be non-empty and different, and labels may only be given for known tasks."""
    if any(not task for task in tasks):
        raise ZipItError(f"A task has an empty name in {tasks}; give every expert a name.")
    if len(set(tasks)) != len(tasks):
        twice = next(task for task, count in Counter(tasks).items() if count > 1)
        raise ZipItError(f"The task name '{twice}' is used twice in {tasks}; task names must differ.")
    if stray := [task for task in task_labels if task not in tasks]:
        raise ZipItError(f"task_labels names the task '{stray[0]}', which is not among the tasks {tasks}.")
    if task_labels and (bare := [task for task in tasks if task not in task_labels]):
        raise ZipItError(f"task_labels has no entry for the task '{bare[0]}'; give labels for all tasks or for none.")


def joint_rule(tasks: list[str], task_labels: Mapping[str, Labels]) -> Literal["concatenate", "vote"]:
    """Vote when there are no labels (one vocabulary) or all tasks share the same *named* classes; else concatenate."""
    if not task_labels:
        return "vote"
    first, *others = (task_labels[task] for task in tasks)
    named = any(name != f"LABEL_{key}" for key, name in first.items())
    return "vote" if others and named and all(labels == first for labels in others) else "concatenate"


def joint_labels(tasks: list[str], task_labels: Mapping[str, Labels], joint: str) -> Labels:
    """The union of the tasks' classes in task order; names that occur in several tasks become `task/name`."""
    if joint == "vote":
        return dict(task_labels[tasks[0]])
    counts = Counter(name for task in tasks for name in set(task_labels[task].values()))
    names = [
        (task, name, f"{task}/{name}" if counts[name] > 1 else name)
        for task in tasks
        for _, name in sorted(task_labels[task].items())
    ]
    plain = {name for _, _, name in names}
    if len(plain) < len({(task, name) for task, name, _ in names}):  # a prefixed name met another task's real name
        names = [(task, name, f"{task}/{name}") for task, name, _ in names]
    return {position: name for position, (_, _, name) in enumerate(names)}


AutoConfig.register(ZipItConfig.model_type, ZipItConfig, exist_ok=True)
