"""Small random models of many families, a base and two fine-tuned copies each, merged from files to files.

    python -m benchmarks.families                                # hf_zipit alone
    python -m benchmarks.families --mergekit PYTHON              # mergekit beside it, by the Python of its environment
    python -m benchmarks.families --only Mixtral                 # classes whose name contains this

Each is written as `save_pretrained` writes it, merged by the mean and by task arithmetic, and what was written is
loaded again. Every tensor is compared with the equation, computed from those that the models had before they were
written. Statistics that are counted and not trained may be the mean in both merges. hf_zipit leaves heads apart: what
it holds for every task must be the expert's own, to the bit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.coverage import in_general_position, told, with_tensors
from benchmarks.measure import machine, sources
from benchmarks.programs import HF_ZIPIT, MERGEKIT, SCALE, Program
from hf_zipit.symmetry.proof import model_tensors, perturb

CLASSES = """
    BertForMaskedLM RobertaForSequenceClassification DistilBertForTokenClassification AlbertForSequenceClassification
    ElectraForSequenceClassification MPNetForMaskedLM DebertaV2ForSequenceClassification ModernBertForMaskedLM
    T5ForConditionalGeneration BartForConditionalGeneration WhisperForConditionalGeneration
    GPT2LMHeadModel GPTNeoXForCausalLM BloomForCausalLM OPTForCausalLM LlamaForCausalLM MistralForCausalLM
    Qwen3ForCausalLM Gemma2ForCausalLM Phi3ForCausalLM MixtralForCausalLM Qwen3MoeForCausalLM MambaForCausalLM
    ViTForImageClassification Dinov2ForImageClassification SwinForImageClassification ConvNextForImageClassification
    ResNetForImageClassification SegformerForSemanticSegmentation CLIPModel Wav2Vec2ForCTC
"""
"""Encoders, decoders and pairs of both, of text, images and sound; with shared layers, fused projections, transposed
matrices, mixtures of experts, states instead of attention, and statistics that are counted."""

MERGES: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "average": ({}, {"merge_method": "linear", "parameters": {"weight": 0.5}}),
    "task-arithmetic": (
        {"combine": "task-arithmetic"},
        {"merge_method": "task_arithmetic", "parameters": {"normalize": False, "weight": SCALE}},
    ),
}
"""By rule the settings for hf_zipit, and what mergekit is told for the same."""

STEP = 0.1
"""How far the fine-tuned copies are from their base, as a share of what random noise of its scale would be."""

TASKS = ("a", "b")

Read = Callable[["Family", Path], Mapping[str, Tensor | Mapping[str, Tensor]]]
"""What a program wrote of a family, as loaded: tensors by name, where every task has its own by task."""


class Family:
    """A base and two fine-tuned copies, in memory and in a folder of their own."""

    def __init__(self, name: str, root: Path) -> None:
        self.name, self.root = name, root
        self.base = in_general_position(name, seed=0)
        self.experts = {task: fine_tuned(self.base, seed) for seed, task in enumerate(TASKS, start=1)}
        for folder, model in {"base": self.base, **self.experts}.items():
            model.save_pretrained(root / folder)

    @property
    def paths(self) -> dict[str, str]:
        return {task: str(self.root / task) for task in TASKS}

    def settings(self, rule: str, out: Path) -> dict[str, Any]:
        """The arguments of `hf_zipit.merge`."""
        settings = MERGES[rule][0]
        base = {"base": str(self.root / "base")} if "combine" in settings else {}
        return {"experts": self.paths, "method": "identity", "output_dir": str(out), **base, **settings}

    def configuration(self, rule: str, out: Path) -> dict[str, Any]:
        """The settings of mergekit."""
        models = [{"model": path} for path in self.paths.values()]
        config = {**MERGES[rule][1], "models": models, "dtype": "float32"}
        if rule != "average":
            config["base_model"] = str(self.root / "base")
        return {"config": config, "output_dir": str(out)}

    @property
    def names(self) -> list[str]:
        """The tensors of floating point, tied ones under each of their names."""
        return [name for name, tensor in self.base.state_dict().items() if tensor.is_floating_point()]

    def right(self, found: Mapping[str, Tensor | Mapping[str, Tensor]], rule: str) -> int:
        """How many tensors are what they should be: what the equation says, or by task the expert's own."""
        start = self.base.state_dict()
        own = {task: model.state_dict() for task, model in self.experts.items()}
        trained = {name for name, _ in self.base.named_parameters(remove_duplicate=False)}
        good = 0
        for name in self.names:
            one = found.get(name)
            if isinstance(one, Mapping):
                good += all(torch.equal(one[task], tensors[name]) for task, tensors in own.items())
                continue
            mean = sum(tensors[name].double() for tensors in own.values()) / len(own)
            learnt = sum(tensors[name].double() - start[name].double() for tensors in own.values())
            wanted = {"average": [mean], "task-arithmetic": [start[name].double() + SCALE * learnt]}[rule]
            wanted += [] if name in trained else [mean]
            good += one is not None and any(same(one, each) for each in wanted)
        return good


def same(found: Tensor, wanted: Tensor) -> bool:
    """Whether a tensor is a wanted one, but for the rounding of a few operations in float32."""
    room = 4 * torch.finfo(torch.float32).eps * wanted.abs().max().clamp_min(1e-6)
    return found.shape == wanted.shape and bool((found.double() - wanted).abs().max() <= room)


def fine_tuned(base: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A copy of a model, a small step away from it in all its tensors."""
    moved = perturb(base.state_dict(), torch.Generator().manual_seed(seed))
    there = {
        name: torch.lerp(tensor, moved[name], STEP) if tensor.is_floating_point() else tensor
        for name, tensor in base.state_dict().items()
    }
    return with_tensors(base, {**model_tensors(base), **there})


def by_hf_zipit(family: Family, out: Path) -> dict[str, Tensor | Mapping[str, Tensor]]:
    """The trunk's tensors in what hf_zipit wrote, and those that it holds for every task."""
    config = transformers.AutoConfig.from_pretrained(out)
    auto = [name for name in config.auto_map if name != "AutoConfig"][-1]
    merged = getattr(transformers, auto).from_pretrained(out)
    found: dict[str, Any] = {}
    for task, branch in merged.branch_names.items():
        for name, tensor in merged.branches[branch].state_dict().items():
            found.setdefault(name, {})[task] = tensor
    return {**found, **merged.trunk.state_dict()}


def by_mergekit(family: Family, out: Path) -> dict[str, Tensor | Mapping[str, Tensor]]:
    """The tensors of the model that mergekit wrote."""
    return dict(type(family.base).from_pretrained(out).state_dict())


@dataclass
class Found:
    """What came of a family: whether all are right, in words how right, how many tensors are tasks' own."""

    right: bool = True
    words: list[str] = field(default_factory=list)
    apart: int = 0

    def add(self, family: Family, read: Read, rule: str, out: Path, error: str | None) -> None:
        """One more merge of the family."""
        total = len(family.names)
        try:
            tensors = {} if error else read(family, out)
        except Exception as problem:
            tensors, error = {}, f"cannot be loaded: {type(problem).__name__}: {problem}"
        good = family.right(tensors, rule)
        self.right &= good == total
        self.apart = sum(isinstance(tensors.get(name), Mapping) for name in family.names)
        word = told(error) if error else f"{good} of {total}"
        alike = any(word.partition(":")[0] == one.partition(":")[0] for one in self.words)  # the same error elsewhere
        self.words += [] if alike else [word]


def main(
    mergekit: Annotated[str | None, typer.Option(help="The Python of an environment that has mergekit.")] = None,
    only: Annotated[str, typer.Option(help="Classes whose name contains this.")] = "",
) -> None:
    """Write, merge, compare; a table."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as room:
        root = Path(room)
        families = [Family(name, root / name) for name in CLASSES.split() if only in name]
        programs: dict[str, tuple[Program, Callable[..., dict[str, Any]], Read]]
        programs = {"hf_zipit": (Program(HF_ZIPIT), Family.settings, by_hf_zipit)}
        if mergekit is not None:
            programs["mergekit"] = (Program(MERGEKIT, mergekit), Family.configuration, by_mergekit)
        columns = {title: [Found() for _ in families] for title in programs}
        for title, (program, settings, read) in programs.items():
            asked = [(i, rule, families[i].root / f"{title}-{rule}") for i in range(len(families)) for rule in MERGES]
            done = program.run([settings(families[i], rule, out) for i, rule, out in asked])
            for (i, rule, out), one in zip(asked, done, strict=True):
                columns[title][i].add(families[i], read, rule, out, one["error"])
        print(f"| class | heads' own | {' | '.join(columns)} |")
        print(f"| --- | ---: |{' ---: |' * len(columns)}")
        for i, family in enumerate(families):
            cells = [", ".join(own[i].words) for own in columns.values()]
            print(f"| {family.name} | {columns['hf_zipit'][i].apart} | {' | '.join(cells)} |")
        for title, own in columns.items():
            print(f"\n{title}: every tensor right in {sum(one.right for one in own)} of {len(own)} families")
        print(f"\nsources {sources()}, {machine()}")
        if mergekit is not None:
            print(f"beside it {programs['mergekit'][0].versions('mergekit', 'torch', 'transformers')}")


if __name__ == "__main__":
    typer.run(main)
