"""What share of the trunk's parameters the refit solves, and how many attention layers as a whole, class by class.

    python -m benchmarks.solved [--only Swin]

Every class is merged in its smallest form (`smallest.py`) from two random models, with example inputs like those that
its adapter makes. Of a layer of attention either the logits and the values are solved as a whole, or the values alone.
Heads may be split, and units of MLPs chosen, where the last columns say so.
"""

from __future__ import annotations

from typing import Annotated

import torch
import transformers
import typer
from transformers import PreTrainedModel

import hf_zipit
from benchmarks.coverage import samples
from benchmarks.smallest import smallest_model
from hf_zipit.refit import walk
from hf_zipit.symmetry.proof import model_tensors, perturb

CLASSES = """
    BertForMaskedLM RobertaForMaskedLM AlbertForMaskedLM DebertaV2ForMaskedLM MPNetForMaskedLM ModernBertForMaskedLM
    ViTForImageClassification Dinov2ForImageClassification SwinForImageClassification ConvNextForImageClassification
    EfficientNetForImageClassification SiglipModel CLIPModel GPT2LMHeadModel GPTNeoXForCausalLM LlamaForCausalLM
    Qwen3ForCausalLM Phi3ForCausalLM MixtralForCausalLM T5ForConditionalGeneration BartForConditionalGeneration
    WhisperForConditionalGeneration Wav2Vec2ForSequenceClassification SegformerForImageClassification
    SegformerForSemanticSegmentation BeitForImageClassification FalconForCausalLM Gemma2ForCausalLM BloomForCausalLM
    GlmForCausalLM GPTJForCausalLM OPTForCausalLM Qwen3MoeForCausalLM HubertForSequenceClassification
    Swinv2ForImageClassification ConvNextV2ForImageClassification RegNetForImageClassification
    MobileNetV2ForImageClassification
"""
"""The classes of the table."""

SHOWN = 3
"""So many of what is kept are named."""


def row(name: str) -> str:
    """A class's row of the table."""
    experts = {task: _random(name, seed) for seed, task in enumerate("ab")}
    data = samples(experts["a"])
    walks: list[walk.Walk] = []
    run = walk.Walk.run
    try:
        walk.Walk.run = lambda self: walks.append(self) or run(self)  # type: ignore[method-assign,assignment,func-returns-value]
        result = hf_zipit.merge(experts, data, method="permute", refit=True, corrections={})
    finally:
        walk.Walk.run = run  # type: ignore[method-assign]
    (found,) = walks
    kept = set(hf_zipit.refit.RefitReport.of(result).untouched)
    sizes = {key: p.numel() for key, p in experts["a"].named_parameters() if key in found.cut.trunk}
    solved = 1 - sum(size for key, size in sizes.items() if key in kept) / sum(sizes.values())
    layers = list(found.attention.values())
    whole = sum(layer.logits is not None for layer in layers)
    named = ", ".join(sorted((key for key in kept if key in sizes), key=lambda key: -sizes[key])[:SHOWN])
    cells = [name, f"{100 * solved:.1f} %", whole, len(layers) - whole, len(found.splits), len(found.mlps), named]
    return f"| {' | '.join(map(str, cells))} |"


def _random(name: str, seed: int) -> PreTrainedModel:
    """A small model of a class in general position; what no file holds stays what the configuration makes it."""
    model = smallest_model(getattr(transformers, name))
    saved, tensors = model.state_dict().keys(), model_tensors(model)
    moved = perturb(tensors, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for key in saved:
            tensors[key].copy_(moved[key])
    return model


def main(only: Annotated[str, typer.Option(help="A part of the names of the classes that are tried.")] = "") -> None:
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print("| class | solved | attention as a whole | values | heads may be split | MLPs chosen | kept |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | --- |")
    for name in CLASSES.split():
        if only.lower() in name.lower():
            print(row(name), flush=True)


if __name__ == "__main__":
    typer.run(main)
