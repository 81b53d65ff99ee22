"""The models and data that the documentation names, small and made here: `me/vit-clothes` is a folder, not a repo."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, Image
from peft import LoraConfig, get_peft_model
from PIL import Image as Picture
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification

import hf_zipit

from .processors import WORDS, image_processor, tokenizer

ROOT = Path(__file__).parents[1]
CLASSES = {"clothes": ["shirt", "coat", "dress"], "shoes": ["boot", "sandal"]}


def vit(task: str, seed: int) -> ViTForImageClassification:
    """A tiny image classifier with the classes of a task."""
    labels = dict(enumerate(CLASSES[task]))
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8,
        id2label=labels, label2id={label: i for i, label in labels.items()},
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


def bert(seed: int) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=len(WORDS),
        max_position_embeddings=32, num_labels=2 + seed,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def lora(task: str, seed: int, base: Path) -> nn.Module:
    """An adapter of a saved BERT, with a classifier of its own."""
    model = BertForSequenceClassification.from_pretrained(base)
    settings = LoraConfig(task_type="SEQ_CLS", r=2 + seed, target_modules=["query", "value"])
    adapter = get_peft_model(model, settings)
    torch.manual_seed(seed)
    for name, parameter in adapter.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return adapter


def pictures(count: int, seed: int) -> Dataset:
    """Pictures of noise, of all classes in turn."""
    generator = np.random.default_rng(seed)
    names = [name for own in CLASSES.values() for name in own]
    noise = [Picture.fromarray(generator.integers(0, 256, (20, 20, 3), dtype=np.uint8)) for _ in range(count)]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    return Dataset.from_dict({"image": noise, "label": [i % len(names) for i in range(count)]}, features=features)


def make_world(folder: Path) -> Path:
    """Fill a folder; returns it."""
    for seed, task in enumerate(CLASSES):
        vit(task, seed).save_pretrained(folder / "me" / f"vit-{task}")
        image_processor().save_pretrained(folder / "me" / f"vit-{task}")
    vit("clothes", 2).save_pretrained(folder / "me" / "vit-hats")  # the same classes, for pictures of its own
    image_processor().save_pretrained(folder / "me" / "vit-hats")
    for seed, task in enumerate(("mood", "topic")):
        bert(seed).save_pretrained(folder / "me" / f"bert-{task}")
        tokenizer().save_pretrained(folder / "me" / f"bert-{task}")
        lora(task, seed, folder / "me" / "bert-mood").save_pretrained(folder / "me" / f"lora-{task}")
    data = folder / "me" / "pictures" / "data"
    data.mkdir(parents=True)
    for seed, split in enumerate(("train", "test")):
        pictures(40, seed).to_parquet(str(data / f"{split}-00000-of-00001.parquet"))
    experts = {task: str(folder / "me" / f"vit-{task}") for task in CLASSES}
    merged = hf_zipit.merge(experts, prepared(), method="permute")
    merged.save_pretrained(folder / "me" / "merged")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    shorten(folder / "recipes" / "quickstart.yaml")
    shutil.copyfile(ROOT / "tests" / "docs_recipe.yaml", folder / "recipe.yaml")
    return folder


def shorten(recipe: Path) -> None:
    """A recipe that does everything that it did, but less often and for smaller models."""
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    content["train"]["epochs"] = 1
    content["train"]["model"] |= {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2}
    content["method"], content["depth"] = ["permute", "zip+refit"], [1.0, 0.5]
    content["calibration"]["samples"] = content["evaluation"]["samples"] = 64
    recipe.write_text(yaml.safe_dump(content), encoding="utf-8")


def prepared() -> dict[str, torch.Tensor]:
    """Unlabelled inputs of both tasks, ready for the models."""
    generator = torch.Generator().manual_seed(0)
    return {task: torch.randn(24, 3, 16, 16, generator=generator) for task in CLASSES}
