"""One trunk, many branches: several models of one class share modules, and every tensor is in the state dict once.

A branch is a whole source model in which every shared module is replaced by a `Shared` stand-in. The stand-in calls
the trunk's module but does not own it, so the module's tensors appear under `trunk.` only. In a joint forward
(`run_together`) the first branch computes the shared modules, the others get the remembered outputs.

Invariants: a joint forward runs every shared module once; its result equals running the branches one by one; and a
deep copy of the model reads the copy's trunk.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import ZipItError

try:
    from transformers.utils.output_capturing import install_all_output_capturing_hooks
except ImportError:  # older ones collect what layers return, wherever these are
    install_all_output_capturing_hooks = None  # type: ignore[assignment]


class Shared(nn.Module):
    """Stand-in for a module of the trunk: calls it, or returns what it already returned in this joint forward.

    The module is the one under `path` in the trunk, `""` the trunk itself; `task` is the branch's, as a module name.
    """

    def __init__(self, trunk: nn.Module, path: str, task: str | None = None) -> None:
        super().__init__()
        # Past nn.Module.__setattr__, which would register the trunk as a child and list its tensors once more here.
        # Holding trunk and path, not the module, survives its replacement (quantisation, adapters).
        self.__dict__["_trunk"] = trunk
        self.path, self.task = path, task

    @property
    def target(self) -> nn.Module:
        return self.__dict__["_trunk"].get_submodule(self.path)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        target = self.target
        now = _now()
        if now.memo is not None:
            return now.memo.recall(target, lambda: target(*args, **kwargs))
        before, now.task = now.task, self.task
        try:
            return target(*args, **kwargs)
        finally:
            now.task = before

    def __getattr__(self, name: str) -> Any:
        # Parents read attributes of their children, such as `self.embeddings.patch_embeddings`.
        if name == "_trunk" or name.startswith("__"):
            raise AttributeError(name)  # half-built, as during unpickling: asking the trunk would never end
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.target, name)

    def extra_repr(self) -> str:
        return f"trunk.{self.path}"


class Memo:
    """What the shared modules returned in the joint forward that is running, by module and number of the call."""

    def __init__(self, recording: bool = False) -> None:
        self.outputs: dict[tuple[int, int], tuple[Any, list[int]]] = {}
        self.calls: Counter[int] = Counter()
        self.recording = recording  # what is recorded is recorded while it is computed: for every branch again

    def next_branch(self) -> None:
        """Every branch counts its calls from the start: a module may be called several times within one."""
        self.calls.clear()

    def recall(self, module: nn.Module, compute: Callable[[], Any]) -> Any:
        if self.recording:
            return compute()
        key = (id(module), self.calls[id(module)])
        self.calls[id(module)] += 1
        known = self.outputs.get(key)
        if torch.compiler.is_compiling():  # which knows no versions; it makes copies that nobody writes to vanish
            if known is None:
                known = self.outputs[key] = (compute(), [])
            return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, known[0])
        # A branch may have written into the tensor it got (`x += residual`): then compute it again.
        if known is None or known[1] != versions(known[0]):
            output = compute()
            self.outputs[key] = (hand_out(output), versions(output))
            return output
        return hand_out(known[0])


def hand_out(output: Any) -> Any:
    """The same tensors in new containers, because models assign to fields of the outputs they get (CLIP's pooler).

    Inference tensors do not count writes, so there everyone gets a copy.
    """
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) and x.is_inference() else x, output)


def versions(output: Any) -> list[int]:
    """How often each tensor of an output was written to."""
    return [x._version for x in tree_leaves(output) if isinstance(x, Tensor) and not x.is_inference()]


class Now:
    """What is running: the outputs of the joint forward pass, or inside the trunk the task that it runs for.

    `inputs`: of a pass that is for a router's features only; `notes`: what modules leave for those that run later.
    """

    def __init__(self) -> None:
        self.memo: Memo | None = None
        self.task: str | None = None
        self.inputs: Mapping[str, Any] | None = None
        self.notes: dict[Any, Any] = {}


class OfThread(threading.local, Now):
    """The same for every thread of its own: threads that run one model do not see each other's outputs."""


_of_thread, _compiling = OfThread(), Now()


def _now() -> Now:
    """What is running in this thread; torch.compile follows plain objects alone, and traces in one thread."""
    return _compiling if torch.compiler.is_compiling() else _of_thread


def running_jointly() -> bool:
    """Whether this is a joint forward pass, in which the trunk runs for all tasks."""
    return _now().memo is not None


def running_task() -> str | None:
    """Inside the trunk, the module name of the task that it runs for; None in a joint forward pass."""
    return _now().task


def notes() -> dict[Any, Any]:
    """What modules note in a forward pass for those that run later in it, of this thread."""
    return _now().notes


@contextmanager
def run_together(recording: bool = False) -> Iterator[Memo]:
    """Inside, shared modules are computed once. Call `next_branch()` of the memo before every branch.

    `recording`: once for every branch, each of which records what they compute.
    """
    now = _now()
    before, now.memo = now.memo, Memo(recording)
    try:
        yield now.memo
    finally:
        now.memo = before


def feature_inputs() -> Mapping[str, Any] | None:
    """The inputs of a forward pass that is for a router's features only; None in any other."""
    return _now().inputs


@contextmanager
def for_features(inputs: Mapping[str, Any]) -> Iterator[None]:
    """Inside, forward passes are joint, and for a router's features only."""
    now = _now()
    before, now.inputs = now.inputs, inputs
    try:
        with run_together() as memo:
            memo.next_branch()
            yield
    finally:
        now.inputs = before


def module_under(trunk: nn.Module, path: str, setting: str) -> nn.Module:
    """The module under a path; raises ZipItError, which names the setting that has it, where there is none."""
    try:
        return trunk.get_submodule(path)
    except AttributeError:
        raise ZipItError(f"{setting} names '{path}', which is not a module of the trunk.") from None


def check_shared(model: nn.Module, shared: Sequence[str]) -> None:
    """Every shared path must be a module of the source model, and none may lie inside another."""
    known = {name for name, _ in model.named_modules(remove_duplicate=False)}
    for path in shared:
        if path not in known:
            raise ZipItError(f"The shared module '{path}' does not exist in {type(model).__name__}.")
        for other in shared:
            if path != other and (other == "" or path.startswith(f"{other}.")):
                raise ZipItError(
                    f"The shared module '{path}' lies inside '{other or 'the whole model'}'; name only the outer one."
                )


def take_trunk(model: nn.Module, shared: Sequence[str]) -> nn.Module:
    """The shared modules of a source model under their paths in an otherwise empty module. `model` keeps them, too."""
    if "" in shared:
        return model
    trunk = nn.Module()
    for path in shared:
        add_under(trunk, path, model.get_submodule(path))
    return trunk


def make_branch(model: nn.Module, trunk: nn.Module, shared: Sequence[str], task: str | None = None) -> nn.Module:
    """The source model with its shared modules replaced by stand-ins for the trunk's (in place, dropping its own)."""
    if "" in shared:
        return Shared(trunk, "", task)
    for path in shared:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, Shared(trunk, path, task))
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and next(module.parameters(), None) is None:
            module.__class__ = placed(type(module))
    return model


def record_trunk(branch: nn.Module) -> None:
    """Have the trunk's modules tell a branch that asks for hidden states or attentions what they compute.

    transformers hooks a model's own modules, to which those behind stand-ins do not belong: they get the hooks of the
    models that they are a part of in the branch. To be called once.
    """
    if install_all_output_capturing_hooks is None:
        return
    parts: dict[str, dict[str, nn.Module]] = {}
    models = [name for name, module in branch.named_modules() if isinstance(module, PreTrainedModel)]
    for path, module in branch.named_modules():
        if isinstance(module, Shared) and not isinstance(module.target, PreTrainedModel):  # which records by itself
            owner = max((name for name in models if not name or path.startswith(f"{name}.")), key=len, default=None)
            if owner is not None:
                parts.setdefault(owner, {})[path[len(owner) + bool(owner) :]] = module.target
    for owner, modules in parts.items():
        model_class = type(branch.get_submodule(owner))
        holder = model_class.__new__(model_class)
        nn.Module.__init__(holder)
        for path, module in modules.items():
            add_under(holder, path, module)
        install_all_output_capturing_hooks(holder)


def add_under(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module into an otherwise empty one, under its path."""
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root._modules[parent]  # type: ignore[assignment]
    root.add_module(name, module)


class Placed:
    """A model without parameters of its own, whose `device` and `dtype` are the trunk's: forward passes ask."""

    def _like(self) -> Tensor:
        stand_ins = (module for module in self.modules() if isinstance(module, Shared))  # type: ignore[attr-defined]
        return next(parameter for module in stand_ins for parameter in module.target.parameters())

    @property
    def device(self) -> torch.device:
        return self._like().device

    @property
    def dtype(self) -> torch.dtype:
        return self._like().dtype

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle finds a class by its name, and that is the class that this one is made of."""
        return _again, (type(self).__mro__[2],), self.__getstate__()


def _again(model_class: type) -> Any:
    made = placed(model_class)
    return made.__new__(made)


@cache
def placed(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    return type(model_class.__name__, (Placed, model_class), {"__module__": model_class.__module__})


def resize(trunk: nn.Module, shapes: dict[str, Sequence[int]]) -> None:
    """Give trunk tensors other shapes (wider or narrower merged layers), with the sizes their modules write down.

    New tensors are uninitialised; modules that were initialised are marked to be initialised again.
    """
    for name, shape in shapes.items():
        path, _, leaf = name.rpartition(".")
        try:
            module = trunk.get_submodule(path)
            old = getattr(module, leaf)
        except AttributeError:
            raise ZipItError(f"trunk_shapes names '{name}', which is not a tensor of the trunk.") from None
        new = torch.empty(tuple(shape), dtype=old.dtype, device=old.device)
        if isinstance(old, nn.Parameter):
            setattr(module, leaf, nn.Parameter(new, requires_grad=old.requires_grad))
        else:
            module._buffers[leaf] = new
        write_down_sizes(module)
        module._is_hf_initialized = False


def write_down_sizes(module: nn.Module) -> None:
    """Make the sizes that torch's layers keep as attributes those of their weights."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.LayerNorm) and weight is not None:
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.modules.batchnorm._NormBase) and weight is not None:
        module.num_features = weight.shape[0]
    elif isinstance(module, nn.GroupNorm) and weight is not None:
        module.num_channels = weight.shape[0]
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape
    elif isinstance(module, Conv1D):
        module.nx, module.nf = weight.shape
    elif isinstance(module, nn.modules.conv._ConvNd) and not module.transposed:
        if module.groups == module.in_channels == module.out_channels:  # every channel has its own kernel
            module.groups = weight.shape[0]
        module.out_channels, module.in_channels = weight.shape[0], weight.shape[1] * module.groups
