"""The pairs of the zoo, by name. A new pair is one more line here."""

from __future__ import annotations

from benchmarks.zoo.pairs.captions_clip import CaptionsClip
from benchmarks.zoo.pairs.chars_roberta import CharsAlbert, CharsDeberta, CharsMixed, CharsRoberta
from benchmarks.zoo.pairs.fashion import FashionResNet, FashionViT
from benchmarks.zoo.pairs.glosses_mlm import GlossesPreLayerNorm, GlossesRoberta
from benchmarks.zoo.pairs.many import Many
from benchmarks.zoo.pairs.scenes import Objects, Segmentation
from benchmarks.zoo.pairs.seq2seq_t5 import Seq2SeqT5
from benchmarks.zoo.pairs.speech import Speech
from benchmarks.zoo.pairs.text_causal import TextGemma2, TextGPT2, TextLlama, TextNeoX, TextOlmo2, TextQwen3
from benchmarks.zoo.pairs.wordnet_bert import WordNetBert
from benchmarks.zoo.recipe import Recipe

COUNTS, NARROW = (2, 3, 4, 6, 8), 64
"""Of the experts of `many`, and the width of the narrow ones."""

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        FashionViT(),
        FashionResNet(),
        WordNetBert(),
        CaptionsClip(),
        GlossesRoberta(),
        GlossesPreLayerNorm(),
        CharsRoberta(),
        CharsMixed(),
        CharsDeberta(),
        CharsAlbert(),
        TextLlama(),
        TextGPT2(),
        TextQwen3(),
        TextNeoX(),
        TextOlmo2(),
        TextGemma2(),
        Seq2SeqT5(),
        Speech(),
        Segmentation(),
        Objects(),
        *map(Many, COUNTS),
        *(Many(count, NARROW) for count in COUNTS),
    )
}
