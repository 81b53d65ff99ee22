"""What share of the trunk's parameters the refit solves, and how many attention layers as a whole, class by class.

    python -m benchmarks.solved [--only Swin]

Every class is merged in its smallest form (`smallest.py`) from two random models, with example inputs like those that
its adapter makes; `coverage.py` measures the share for all classes. Of a layer of attention either the logits and the
values are solved as a whole, or the values alone. Where the last columns say so, experts' heads may stay heads
of their own (split, or chosen), and units of MLPs may be chosen.
"""

from __future__ import annotations

from typing import Annotated

import transformers
import typer

from benchmarks.coverage import solved

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


def row(name: str) -> str:
    """A class's row of the table."""
    found = solved(name)
    cells = [name, f"{100 * found.share:.1f} %", found.whole, found.values, found.own_heads, found.chosen]
    return f"| {' | '.join(map(str, [*cells, ', '.join(found.kept)]))} |"


def main(only: Annotated[str, typer.Option(help="A part of the names of the classes that are tried.")] = "") -> None:
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print("| class | solved | attention as a whole | values | heads may stay apart | MLPs chosen | kept |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | --- |")
    for name in CLASSES.split():
        if only.lower() in name.lower():
            print(row(name), flush=True)


if __name__ == "__main__":
    typer.run(main)
