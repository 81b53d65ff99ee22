"""The merged multi-head model: one trunk, and for every task a branch with its head.

    merged(pixel_values=x).logits                  # joint: the classes of all tasks, the trunk runs once
    merged(pixel_values=x, task="shoes").logits    # one task, exactly what that branch computes

Nothing here knows a model family: trunk and branches are modules of the source class (`trunk.py`, `empty_model.py`),
entered through the unmerge maps (`entries.py`), joined by pure functions (`joint.py`).

Invariants: every tensor is once in the state dict (`trunk.`, `branches.TASK.`, `entries.TASK.`, `exits.TASK.`,
`rescales.`, `surgery.`, `residues.`, `router.`, `gates.`, `mixtures.`), and a saved and loaded model gives
bit-identical outputs.
"""

from __future__ import annotations

import copy
import re
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from accelerate.hooks import add_hook_to_module
from huggingface_hub import CommitInfo
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel
from transformers.utils import ModelOutput, logging

from ..errors import ExpertError, ZipItError
from ..files import adding_to
from ..files.folder import link
from ..files.known import WEIGHTS
from ..files.tensors import damage
from ..hub.processors import Files, processor_files, write_files
from ..registry import CONVERSIONS
from .configuration import ZipItConfig
from .empty_model import empty_model
from .entries import Entry, attach, leave, make_entries
from .gates import Gate, make_gates
from .head_dims import cut_heads
from .hub import COMPANIONS, auto_map, open_repo, push_folder, write_remote_module
from .joint import joint_ids, joint_loss, side_by_side
from .mixtures import VectorMixture, make_mixtures
from .rescale import Affine, make_rescales
from .residue import Residue
from .residues import make_residues, residue_of
from .router import Router, make_router, read_features
from .surgery import Surgery, make_surgery
from .token_tables import resize_tables
from .trunk import check_shared, make_branch, record_trunk, resize, run_together, take_trunk

logger = logging.get_logger(__name__)

Task = str | Sequence[str] | Tensor | None

Outputs = OrderedDict[str, Any]
"""A `ModelOutput` of the source class's own type; `forward` cannot say which, and `ModelOutput` itself has no fields,
which sentence-transformers asks an annotation for."""

PUSHING = ("repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")
"""Arguments of `save_pretrained(push_to_hub=True)` that are for the push."""


ROUTED = "auto"
"""In place of a task: the one that the router finds for every sample."""

RECORDED = ("output_hidden_states", "output_attentions")
"""Arguments of a forward pass that ask for what blocks compute."""

MOMENTS, STATISTICS = "moments.safetensors", "statistics.safetensors"


class Savable(Protocol):
    """What writes itself into a file."""

    def save(self, path: str | Path) -> object: ...


class ZipItPreTrainedModel(PreTrainedModel):
    """What all merged models have in common: building, choosing a task, running trunk and branches, saving.

    `output_hidden_states` and `output_attentions` give those of all blocks: the trunk's in merged units, the branches'
    in their experts'. In a joint forward pass the trunk then runs once for every task.
    """

    config_class = ZipItConfig
    config: ZipItConfig
    auto_class: ClassVar[str] = "AutoModel"
    known_processor_files: Files | None = None
    joint_labels: bool = False  # whoever calls knows that labels without a task are ids of the joint classes
    # What the source class cannot do, it refuses itself when the branches are built.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    supports_gradient_checkpointing = True
    # Trainer would leave the division by the number of items to us.
    accepts_loss_kwargs = False

    def __init__(self, config: ZipItConfig) -> None:
        super().__init__(config)
        if not config.tasks:
            raise ZipItError("The configuration names no tasks; a merged model needs at least one.")
        if config.task is not None:  # given to `from_pretrained`, which sets the field alone
            config.answer_for(config.task)
        self.branch_names = module_names(config.tasks)
        first = empty_model(config, config.tasks[0])
        check_shared(first, config.shared)
        self.adopt(first)
        # The trunk is what the first empty model gives up. So its modules read the configuration of the first branch,
        # and settings made later (`set_attn_implementation`) reach the trunk, too.
        self.trunk = take_trunk(first, config.shared)
        resize(self.trunk, config.trunk_shapes)
        cut_heads(self.trunk, config.head_dims, config.rotary_pairs)
        self.branches = nn.ModuleDict()
        for task, key in self.branch_names.items():  # one empty model more is held whole at a time
            model = first if task == config.tasks[0] else empty_model(config, task)
            self.branches[key] = make_branch(model, self.trunk, config.shared, key)
        self.entries = nn.ModuleDict({key: make_entries(config.entries, "module") for key in self.branches})
        self.exits = nn.ModuleDict({key: make_entries(config.exits, "field") for key in self.branches})
        for key, branch in self.branches.items():
            attach(branch, config.entries, self.entries[key])
        if config.rescaled is not None:
            self._make_rescales()
        if config.surgery is not None:
            self._make_surgery()
        if config.residues:
            self._make_residues()
        if config.router is not None:
            self.router = make_router(config.router, self.trunk, len(config.tasks))
        if config.gates is not None:
            self._make_gates()
        if config.mixtures:
            self._make_mixtures()
        self.post_init()

    @classmethod
    def from_pretrained(cls, *source: Any, output_loading_info: bool = False, **settings: Any) -> Any:
        """As of any model of transformers, but a file that lacks a tensor is no model.

        Whoever asks for `output_loading_info` is told in it. Raises ExpertError for missing and unexpected tensors,
        which transformers would draw at random and leave out.
        """
        model, found = super().from_pretrained(*source, output_loading_info=True, **settings)
        if output_loading_info:
            return model, found
        if wrong := damage(found):
            raise ExpertError(f"The merged model {source[0]} is damaged: it {wrong}; save it again, or merge again.")
        return model

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """None: heads stay apart from embeddings, whatever the configurations of the branches say."""
        return {}

    def add_residues(self, settings: Sequence[Mapping[str, Any]]) -> list[Residue]:
        """Per-task residues, zero until they are set, in the order of the settings: see `residues.py`.

        `settings` become `config.residues`. Raises ZipItError if the model has some.
        """
        if self.config.residues:
            raise ZipItError("This model has residues already; start from the merged model.")
        self.config.residues = [dict(setting) for setting in settings]
        self._make_residues()
        return list(residue_of(self.residues, self.config.residues, self.branch_names))

    def add_router(self, module: str, weight: Tensor, bias: Tensor) -> None:
        """A linear discriminant `[tasks, size]` on what a module of the trunk gives: see `router.py`."""
        self.config.router = {"module": module, "size": weight.shape[1]}
        self.router = make_router(self.config.router, self.trunk, len(self.config.tasks))
        self.router.weight.copy_(weight)
        self.router.bias.copy_(bias)
        self.router.train(self.training)

    def add_gates(self, top: int, layers: Sequence[Mapping[str, Any]]) -> list[Gate]:
        """What gives every token the residues of some tasks where none is named, zero until set: see `gates.py`.

        `top` and `layers`, those of the trunk, become `config.gates`. Raises ZipItError if the model has some.
        """
        if self.config.gates is not None:
            raise ZipItError("This model has gates already; start from the merged model.")
        self.config.gates = {"top": top, "layers": [dict(layer) for layer in layers]}
        self._make_gates()
        return list(self.gates)

    def _make_gates(self) -> None:
        names = list(self.branch_names.values())
        self.gates = make_gates(self.config.gates, self.trunk, self.residues, self.config.residues, names)
        self.gates.train(self.training)

    def _make_residues(self) -> None:
        self.residues = make_residues(self.config.residues, self.trunk, self.branch_names)
        self.residues.train(self.training)

    def add_rescales(self, settings: Sequence[Mapping[str, Any]]) -> None:
        """Per-task corrections, the identity until they are set: see `rescale.py`.

        `settings` become `config.rescaled`: the sites in the trunk; every entry and exit is corrected, too. Raises
        ZipItError if the model has such corrections.
        """
        if self.config.rescaled is not None:
            raise ZipItError("This model is rescaled and shifted per task already; start from the merged model.")
        self.config.rescaled = [dict(setting) for setting in settings]
        self._make_rescales()

    def _make_rescales(self) -> None:
        readouts = {"entries": self.entries, "exits": self.exits}
        self.rescales = make_rescales(self.config.rescaled, self.trunk, readouts, self.branches)
        self.rescales.train(self.training)

    def add_surgery(self, rank: int, sites: Sequence[Mapping[str, Any]]) -> None:
        """Networks that correct every task's features, the identity until they are learnt: see `surgery.py`.

        `rank` and `sites`, those in the trunk, become `config.surgery`; every entry and exit gets one, too. Raises
        ZipItError if the model has some.
        """
        if self.config.surgery is not None:
            raise ZipItError("This model's features are corrected per task already; start from the merged model.")
        self.config.surgery = {"rank": rank, "sites": [dict(site) for site in sites]}
        self._make_surgery()

    def _make_surgery(self) -> None:
        readouts = {"entries": self.entries, "exits": self.exits}
        self.surgery = make_surgery(self.config.surgery, self.trunk, readouts, self.branches)
        self.surgery.train(self.training)

    def add_mixtures(self, settings: Sequence[Mapping[str, Any]]) -> list[VectorMixture]:
        """MLPs whose task vectors are weighed for every sample, not at all until that is learnt: see `mixtures.py`.

        `settings` become `config.mixtures`. Raises ZipItError if the model has some.
        """
        if self.config.mixtures:
            raise ZipItError("This model's MLPs are weighed for every sample already; start from the merged model.")
        self.config.mixtures = [dict(setting) for setting in settings]
        self._make_mixtures()
        return list(self.mixtures)

    def _make_mixtures(self) -> None:
        self.mixtures = make_mixtures(self.config.mixtures, self.trunk, self.branches.values(), self.branches)
        self.mixtures.train(self.training)

    def adopt(self, model: PreTrainedModel) -> None:
        """What placing, casting and feeding the model depend on is the source class's."""
        self.main_input_name = model.main_input_name
        self.input_modalities = model.input_modalities
        for name in ("_no_split_modules", "_skip_keys_device_placement", "_keep_in_fp32_modules"):
            setattr(self, name, set(getattr(model, name, None) or []))
        self._keep_in_fp32_modules_strict = set(getattr(model, "_keep_in_fp32_modules_strict", None) or [])

    def _init_weights(self, module: nn.Module) -> None:
        """The source class knows how, also for buffers that are in no file (position ids, rotary frequencies)."""
        if isinstance(module, (Entry, Affine, Surgery, Residue, Router, Gate, VectorMixture)):
            module.reset()
        else:
            next(iter(self.branches.values()))._init_weights(module)

    def initialize_weights(self) -> None:
        """Also what models make for modules inside them and no file has (FalconH1's factors).

        They have no tensors of their own, and transformers takes them for complete.
        """
        super().initialize_weights()
        for module in self.modules():
            if isinstance(module, PreTrainedModel) and module is not self:
                module._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        return next(iter(self.branches.values())).get_input_embeddings()

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """As in transformers, of the embedding and of every task's head.

        Raises ZipItError for a model with residues, which belong to tensors of one size.
        """
        text = self.config.source_config.get_text_config()
        count = text.vocab_size if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            count = -(-count // pad_to_multiple_of) * pad_to_multiple_of
        if self.config.residues:
            raise ZipItError("A model with residues keeps its vocabulary; merge without them to change it.")
        if count != text.vocab_size:
            resize_tables(self, list(self.branches.values()), count, mean_resizing)
            for branch in (self, *self.branches.values()):
                config = getattr(branch.config, "source_config", branch.config)
                config.get_text_config().vocab_size = count
            for name in self.config.trunk_shapes:  # of tables that are as wide as a merged stream
                path, _, leaf = name.rpartition(".")
                self.config.trunk_shapes[name] = list(getattr(self.trunk.get_submodule(path), leaf).shape)
        return self.get_input_embeddings()

    # ------------------------------------------------------------------------------------------- tasks

    def for_task(self, task: str | None) -> ZipItPreTrainedModel:
        """This model, answering for one task where the caller names none; None: for all of them, jointly.

            pipeline("image-classification", model=merged.for_task("shoes"), image_processor=processor)

        A view: it has the same tensors, so that training or moving one moves the other; only its configuration is its
        own, with the task's classes as `id2label`. Saved, it is the whole model that answers for that task, and
        `from_pretrained(..., task="shoes")` loads any merged model so.

        Raises:
            ZipItError: the task is unknown.
        """
        view = copy.copy(self)
        view.config = copy.deepcopy(self.config)
        view.config.answer_for(task)
        # Accelerate replaces `forward` on the instance by one that is bound to it: the view needs its own.
        view.__dict__.pop("forward", None)
        if (hook := view.__dict__.pop("_hf_hook", None)) is not None:
            add_hook_to_module(view, hook)
        return view

    def choose(self, task: Task) -> str | list[str] | None:
        """None (joint), one task, or, for a batch of several tasks, the task of every sample.

        `"auto"` is an empty list, which the router fills: see `route`. Where the caller names none, it is the one that
        this view answers for: see `for_task`. Raises ZipItError if a task is unknown.
        """
        unnamed = task is None or (isinstance(task, str) and task in self.config.joint_names)
        if unnamed and task not in self.config.tasks:
            task = self.config.task
        if task is None or isinstance(task, str):
            routed = task == ROUTED and task not in self.config.tasks and self.config.router is not None
            return [] if routed else task if task is None else self.known(task)
        names = task.flatten().tolist() if isinstance(task, Tensor) else task
        found = [self.known(name) for name in names]
        return found[0] if found and len(set(found)) == 1 else found

    def route(self, inputs: dict[str, Any]) -> list[str]:
        """The task of every sample, by the router."""
        scores = self.router(read_features(inputs, lambda: self.run_branch(self.config.tasks[0], inputs)))
        return [self.config.tasks[number] for number in scores.argmax(-1).tolist()]

    def known(self, task: str | int) -> str:
        """The task's name, also from its position, which is what a collated column of class labels holds."""
        if isinstance(task, int) and 0 <= task < len(self.config.tasks):
            return self.config.tasks[task]
        return self.config.known(task)

    def branch(self, task: str) -> nn.Module:
        """The task's own modules; called directly, it runs the trunk, too."""
        return self.branches[self.branch_names[self.known(task)]]

    def expert(self, task: str) -> PreTrainedModel:
        """One task as a plain model of the experts' class, which can be saved, trained and merged like any other.

        Raises:
            ZipItError: the task is unknown.
            ExpertError: no plain model can compute it; see `hf_zipit.assembly.disassemble`.
        """
        # A model is below what takes it apart: what that needs (symmetries, cuts) is of no use to a model that runs.
        return CONVERSIONS.get("expert")(self, task)

    # --------------------------------------------------------------------------------------- computing

    def run_branch(self, task: str, inputs: dict[str, Any]) -> ModelOutput:
        """One task's output, of the source class's own type."""
        key = self.branch_names[task]
        return leave(self.branches[key](**inputs), self.config.exits, self.exits[key])

    def run_branches(self, run: Callable[[str], ModelOutput], recording: bool = False) -> dict[str, ModelOutput]:
        """What `run` gives for every task on the same batch; the trunk runs once, `recording` once for every task."""
        outputs = {}
        with run_together(recording) as memo:
            for task in self.config.tasks:
                memo.next_branch()
                outputs[task] = run(task)
        return outputs

    def run_samples(self, sample_tasks: list[str], inputs: dict[str, Any]) -> dict[str, ModelOutput]:
        """Every task's output with its own samples alone computed, as that task alone does, with its residue.

        Raises ZipItError if the tasks are not as many as the samples.
        """
        count = next(len(value) for value in inputs.values() if isinstance(value, Tensor) and value.dim())
        if len(sample_tasks) != count:
            raise ZipItError(f"{len(sample_tasks)} task names came with a batch of {count} samples.")
        outputs = {}
        for task in self.config.tasks:  # one sample says what the output of a task without any is like
            index = torch.tensor([row for row, own in enumerate(sample_tasks) if own == task] or [0])
            output = self.run_branch(task, tree_map(partial(some_samples, index=index, count=count), inputs))
            outputs[task] = tree_map(partial(among_all, index=index, count=count), output)
        return outputs

    def join(self, outputs: dict[str, ModelOutput]) -> ModelOutput:
        """The tasks' outputs as one of the same type."""
        axes = {setting["field"]: setting["axis"] for setting in self.config.exits}
        return side_by_side(list(outputs.values()), axes)

    def compute(self, task: Task, labels: Tensor | None, /, **inputs: Any) -> ModelOutput:
        """Joint or one-task output, with the loss where labels are given.

        Labels are ids of the joint classes without a task, and the tasks' own ids wherever tasks are given.
        """
        inputs = {name: value for name, value in inputs.items() if value is not None}
        chosen = self.choose(task)
        recording = any(inputs.get(name) for name in RECORDED)
        if recording and not getattr(self.trunk, "recorded", False):
            record_trunk(next(iter(self.branches.values())))
            self.trunk.recorded = True  # also for views and copies
        if isinstance(chosen, str):
            return self.run_branch(chosen, inputs if labels is None else {**inputs, "labels": labels})
        if chosen == []:
            chosen = self.route(inputs)
        if chosen is not None and self.config.residues:
            outputs = self.run_samples(chosen, inputs)
        else:
            outputs = self.run_branches(lambda name: self.run_branch(name, inputs), recording)
        joint = self.join(outputs) if chosen is None else self.join_samples(outputs, chosen)
        if labels is not None:
            doubtful = chosen is None and self.config.joint == "concatenate"
            if doubtful and not self.training and not self.joint_labels:
                logger.warning_once(
                    "Labels came without a task, so they are read as ids of the joint classes; where they are a "
                    "task's own ids, give `task`, as a column of the data or by `model.for_task(name)`."
                )
            ids = labels if chosen is None else joint_ids(labels, chosen, self.config.offsets())
            # First in the output, as everywhere in transformers: Trainer takes the loss from position 0.
            joint = type(joint)(**{**joint, "loss": joint_loss(joint["logits"], ids, self.config.problem_type)})
        return joint

    def join_samples(self, outputs: dict[str, ModelOutput], sample_tasks: list[str]) -> ModelOutput:
        """The joint output for a batch in which every sample has its own task."""
        raise ZipItError(
            f"A batch of the tasks {sorted(set(sample_tasks))} has no common features; run one task at a time, or "
            "give no task for joint features."
        )

    # ------------------------------------------------------------------------------------------ saving

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As in transformers, plus all that belongs to the model: card, recipe, processor, and the file that lets
        `trust_remote_code=True` load the folder.

        The tensors keep their names in memory: half a source model has no file format of its own to convert to. A
        merged model that is in the folder already is replaced at once, and whole; other files there stay.

        Args:
            save_directory: the folder.
            push_to_hub: whether to push it, too; `repo_id` and the other arguments of `push_to_hub` may follow.
            kwargs: as in transformers.

        Raises:
            OutputError: if the folder cannot be written or holds somebody else's model, or the disk is full.
        """
        pushing = {name: kwargs.pop(name) for name in PUSHING if name in kwargs}
        if not kwargs.get("is_main_process", True):
            self._write(save_directory, **kwargs)
            return
        with adding_to(save_directory) as beside:
            self._write(beside, **kwargs)
            self._write_companions(beside, Path(save_directory).absolute().name)
        if push_to_hub:
            repo_id = pushing.pop("repo_id", None) or Path(save_directory).absolute().name
            shard_size = {"max_shard_size": kwargs["max_shard_size"]} if "max_shard_size" in kwargs else {}
            self.push_to_hub(repo_id, **pushing, **shard_size)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: bool | str | None = None,
        max_shard_size: int | str = "50GB",
        tags: Sequence[str] | None = None,
        moments: Savable | str | Path | None = None,
        statistics: Savable | str | Path | None = None,
        **commit: Any,
    ) -> CommitInfo:
        """Upload what `save_pretrained` writes in one commit: the repo is what it was, or complete.

        Args:
            repo_id, private, token: as for `modeling.hub.open_repo`.
            max_shard_size: of a file with weights.
            tags: more tags for the card.
            moments: the `hf_zipit.Moments` of the merge, or their file, to go along as `moments.safetensors`: who has
                them can merge again with other settings and without data.
            statistics: the same of `hf_zipit.LayerStatistics`, as `statistics.safetensors`.
            commit: `revision`, `create_pr`, `commit_message`, `commit_description`: see `modeling.hub.push_folder`.

        Raises:
            OutputError: if the Hub cannot be reached or refuses.
        """
        repo_id = open_repo(repo_id, private=private, token=token)  # first: who may not push need not wait
        with tempfile.TemporaryDirectory() as room:
            folder = Path(room, repo_id.rpartition("/")[-1])
            folder.mkdir()
            self._write(folder, max_shard_size=max_shard_size)
            self._write_companions(folder, folder.name, repo_id, tags or ())
            for sums, name in ((moments, MOMENTS), (statistics, STATISTICS)):
                if isinstance(sums, (str, Path)):
                    shutil.copyfile(sums, folder / name)
                elif sums is not None:
                    sums.save(folder / name)
            return push_folder(folder, repo_id, token=token, **commit)

    def save_about(self, folder: str | Path) -> None:
        """Write again what stands beside this model's weights in a folder that holds them: configuration and card.

        Raises OutputError as `save_pretrained` does.
        """
        folder = Path(folder)
        with adding_to(folder) as beside:
            for path in (path for pattern in WEIGHTS for path in folder.glob(pattern)):
                link(path, beside / path.name)
            self.write_about(beside, folder.absolute().name)

    def write_about(self, folder: Path, name: str) -> None:
        """Write all but the weights into a folder that is not in its place yet; `name` is the model's."""
        self.write_configuration(folder)
        self._write_companions(folder, name)

    def write_configuration(self, folder: Path) -> None:
        """Write the configurations, as `save_pretrained` does."""
        self.config.auto_map = auto_map(self.auto_class, type(self).__name__)
        self.config.architectures = [type(self).__name__]
        self.config.dtype = str(self.dtype).removeprefix("torch.")
        self.config.save_pretrained(folder)
        if self.can_generate():
            self.generation_config.save_pretrained(folder)

    def _write(self, folder: str | Path, **kwargs: Any) -> None:
        self.config.auto_map = auto_map(self.auto_class, type(self).__name__)
        super().save_pretrained(folder, **kwargs | {"save_original_format": False})

    def _write_companions(self, folder: Path, name: str, repo_id: str | None = None, tags: Sequence[str] = ()) -> None:
        write_remote_module(folder, type(self).__name__)
        write_files(folder, self.processor_files())
        for companion in COMPANIONS:
            COMPANIONS.get(companion)(folder, self, name, repo_id, tags)

    def processor_files(self) -> Files:
        """The files of the experts' processor: what the merge found, else what lies where this was loaded from."""
        if self.known_processor_files is None:
            return processor_files(self.name_or_path, getattr(self.config, "_commit_hash", None))
        return self.known_processor_files

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoModel") -> None:
        """Nothing to do: transformers would copy this file alone, and it needs its package (see `hub.py`)."""


def some_samples(value: Any, index: Tensor, count: int) -> Any:
    """Of what holds `count` samples, those of these numbers."""
    if isinstance(value, Tensor) and value.dim() and len(value) == count:
        return value[index.to(value.device)]
    return value


def among_all(value: Any, index: Tensor, count: int) -> Any:
    """What holds some samples, in its places among `count`; zero elsewhere."""
    if isinstance(value, Tensor) and value.dim() and len(value) == len(index):
        return value.new_zeros(count, *value.shape[1:]).index_copy(0, index.to(value.device), value)
    return value


def module_names(tasks: Iterable[str]) -> dict[str, str]:
    """For every task a name that a module may have: the task's own where possible, else a cleaned, unused one."""
    taken: dict[str, str] = {}
    for task in tasks:
        name = re.sub(r"\W", "_", task)
        while name in taken.values() or hasattr(nn.ModuleDict, name) or hasattr(nn.Module(), name):
            name += "_"
        taken[task] = name
    return taken
