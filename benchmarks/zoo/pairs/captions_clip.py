"""`captions-clip`: two small CLIPs that match Fashion-MNIST images with captions, five classes each.

A caption names the class and, now and then, how bright and how large the thing in this image is, so that it says more
than the class: "a picture of a large dark coat". Both experts share one tokenizer. They are scored by zero-shot
classification: the image against one prompt a class, in a wording that no training caption has.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, PreTrainedTokenizerBase

from benchmarks.zoo.pair import Metric, Splits, Tensors, rows
from benchmarks.zoo.pairs.fashion import CLASSES, VALIDATION, flip_and_shift, half
from benchmarks.zoo.recipe import Recipe, Schedule, split_indices
from benchmarks.zoo.sources.fashion_mnist import normalise
from benchmarks.zoo.wordpiece import encode, train_wordpiece

TEMPLATES = (
    "a photo of a {}",
    "a picture of one {}",
    "an image of a {}",
    "this is a {}",
    "a {} in a photo",
    "the picture of the {}",
    "one {}",
    "{}",
)
PROMPT = "this photo is of one {}"  # every word of it occurs in the templates, the sentence does not
SHADES, SHADE_LIMITS = ("dark", "grey", "bright"), (145.0, 185.0)  # mean value of the thing's pixels, about terciles
SIZES, SIZE_LIMITS = ("small", "", "large"), (0.36, 0.54)  # share of the image that it fills, about terciles
BACKGROUND = 30  # pixels up to this value show nothing
ADJECTIVE = 0.5  # the share of captions with each kind of adjective
LENGTH = 16
VOCABULARY = 128
SPECIALS = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[BOS]", "eos_token": "[EOS]"}


class CaptionsClip(Recipe):
    name = "captions-clip"
    about = "CLIP (two pre-LN towers), captions of Fashion-MNIST, 5 + 5 classes, zero-shot"
    model_class = CLIPModel
    schedule = Schedule(epochs=2, batch_size=64, learning_rate=7e-4, weight_decay=0.05)
    seeds = {"a": 61, "b": 62}

    def train_tokenizer(self) -> PreTrainedTokenizerBase:
        texts = [template.format(" ".join(SHADES + SIZES)) for template in TEMPLATES]
        texts += [thing(name) for names in CLASSES.values() for name in names]
        return train_wordpiece(texts * 2, VOCABULARY, LENGTH, SPECIALS)

    def splits(self, tokenizer: PreTrainedTokenizerBase) -> Splits:
        found: Splits = {}
        for task in CLASSES:
            data = _captioned("train", task, tokenizer)
            parts = split_indices(len(data["labels"]), VALIDATION, 0, seed=0)
            found[task] = {split: rows(data, parts[split]) for split in ("train", "validation")}
            found[task]["test"] = _captioned("test", task, tokenizer)
        return found

    def untrained(self, task: str, tokenizer: PreTrainedTokenizerBase) -> CLIPModel:
        tower = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4}
        text = CLIPTextConfig(
            vocab_size=len(tokenizer),
            num_hidden_layers=3,
            max_position_embeddings=LENGTH,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,  # CLIP reads the text at this token; 2 would mean the largest id
            **tower,
        )
        vision = CLIPVisionConfig(num_hidden_layers=4, image_size=28, patch_size=4, num_channels=1, **tower)
        return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=64))

    def metric(self, tokenizer: PreTrainedTokenizerBase) -> Metric:
        prompts = {
            task: encode(tokenizer, [PROMPT.format(thing(name)) for name in names]) for task, names in CLASSES.items()
        }
        return Metric("zero-shot accuracy", "logits_per_image", CLASSES, prompts)

    def augment(self, batch: Tensors, tokenizer: PreTrainedTokenizerBase, generator: Generator) -> Tensors:
        return batch | {"pixel_values": flip_and_shift(batch["pixel_values"], generator)}

    def loss(self, model: CLIPModel, batch: Tensors) -> Tensor:
        """The symmetric contrastive loss of CLIP (arXiv 2103.00020)."""
        return model(**{name: tensor for name, tensor in batch.items() if name != "labels"}, return_loss=True).loss


def thing(name: str) -> str:
    """A class's name as a caption says it."""
    return name.split("/")[0].lower()


def captions(pixels: Tensor, labels: Tensor, names: tuple[str, ...], generator: Generator) -> list[str]:
    """One caption for every image `[n, 28, 28]` with values 0 to 255."""
    shown = pixels > BACKGROUND
    shade = torch.bucketize((pixels * shown).sum((1, 2)) / shown.sum((1, 2)).clamp(min=1), torch.tensor(SHADE_LIMITS))
    size = torch.bucketize(shown.float().mean((1, 2)), torch.tensor(SIZE_LIMITS))
    template = torch.randint(len(TEMPLATES), (len(labels),), generator=generator)
    said = torch.rand(2, len(labels), generator=generator) < ADJECTIVE
    found = []
    for label, large, bright, way, say_size, say_shade in zip(
        *(t.tolist() for t in (labels, size, shade, template, *said)), strict=True
    ):
        words = (SIZES[large] if say_size else "", SHADES[bright] if say_shade else "", thing(names[label]))
        found.append(TEMPLATES[way].format(" ".join(filter(None, words))))
    return found


def _captioned(split: str, task: str, tokenizer: PreTrainedTokenizerBase) -> Tensors:
    pixels, labels = half(split, task)
    texts = captions(pixels, labels, CLASSES[task], Generator().manual_seed(0))
    wordings = {text: i for i, text in enumerate(dict.fromkeys(texts))}  # a few hundred, so that little is tokenized
    encoded = rows(encode(tokenizer, list(wordings)), torch.tensor([wordings[text] for text in texts]))
    return {"pixel_values": normalise(pixels), **encoded, "labels": labels}
