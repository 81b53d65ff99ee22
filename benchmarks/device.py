"""Real sizes on an accelerator: train, merge, time and compare, in one command of a few minutes.

    python -m benchmarks.device --prepare out/device      where the data packages are: writes the data as tensors
    python -m benchmarks.device --data out/device         where an accelerator is

Two ViT-B (12 x 768, images of 64 x 64 in patches of 8) from different initialisations learn five classes each of
Fashion-MNIST, two models of BERT-base's size six classes each of WordNet's definitions, all in bfloat16. They are
merged by averaging and by the default (permute + refit) from 512 unlabelled samples a task, and scored on the test
split. Before that a small trained pair of either kind is merged on the CPU and on the device, and logits are compared.

The script needs torch, transformers, accelerate and what hf_zipit imports; neither `datasets` nor `evaluate`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification
from transformers.utils.logging import disable_progress_bar

from benchmarks.stages import timed_stages
from hf_zipit import merge

SAMPLES = 512  # unlabelled calibration samples a task
TRAINED = {"vit": 3000, "bert": 2500}  # samples of a class
Data = dict[str, dict[str, Tensor]]


def prepare(folder: Path) -> None:
    """Write the data of both pairs: by task `train`, `calibration` and `test`, inputs and labels."""
    from benchmarks.zoo.pairs.wordnet_bert import WordNetBert
    from hf_zipit.recipe.sources import FASHION_FOLDER, read_idx

    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for split in ("train", "test"):
        images, labels = (torch.from_numpy(x.copy()) for x in read_idx(FASHION_FOLDER, split))
        for task, first in (("a", 0), ("b", 5)):
            for kind, rows in _rows(labels, range(first, first + 5), split, TRAINED["vit"]).items():
                found[f"{task}.{kind}.pixel_values"] = images[rows].contiguous()
                found[f"{task}.{kind}.labels"] = (labels[rows] - first).to(torch.uint8)
    save_file(found, folder / "vit.safetensors")
    recipe, found = WordNetBert(), {}
    tokenizer = recipe.train_tokenizer()
    for task, splits in recipe.splits(tokenizer).items():
        shuffled = torch.randperm(len(splits["train"]["labels"]), generator=torch.Generator().manual_seed(0))
        parts = {"train": shuffled[SAMPLES:], "calibration": shuffled[:SAMPLES]}
        for kind, columns in (*((kind, {n: x[i] for n, x in splits["train"].items()}) for kind, i in parts.items()),
                              ("test", splits["test"])):  # fmt: skip
            for name, tensor in columns.items():
                found[f"{task}.{kind}.{name}"] = tensor.to(torch.int16).contiguous()
    save_file(found, folder / "bert.safetensors", {"vocabulary": str(len(tokenizer))})


def _rows(labels: Tensor, classes: range, split: str, most: int) -> dict[str, Tensor]:
    """Rows by kind: of the training split `most` of a class, and others for calibration."""
    generator = torch.Generator().manual_seed(0)
    of_class = [(labels == label).nonzero().squeeze(1) for label in classes]
    if split == "test":
        return {"test": torch.cat(of_class)}
    drawn = [rows[torch.randperm(len(rows), generator=generator)] for rows in of_class]
    rest = torch.cat([rows[most:] for rows in drawn])
    chosen = rest[torch.randperm(len(rest), generator=generator)[:SAMPLES]]
    return {"train": torch.cat([rows[:most] for rows in drawn]), "calibration": chosen}


def read(folder: Path, pair: str, task: str, kind: str) -> dict[str, Tensor]:
    """Inputs and labels of one part, as a model takes them."""
    prefix = f"{task}.{kind}."
    found = {
        n.removeprefix(prefix): x for n, x in load_file(folder / f"{pair}.safetensors").items() if n.startswith(prefix)
    }
    if "pixel_values" not in found:
        return {name: tensor.long() for name, tensor in found.items()}
    images = functional.interpolate(found["pixel_values"][:, None].float() / 255, size=64, mode="bilinear")
    return {"pixel_values": (images - 0.2860) / 0.3530, "labels": found["labels"].long()}


def new_model(pair: str, seed: int, size: Mapping[str, int]) -> nn.Module:
    torch.manual_seed(seed)
    if pair == "vit":
        config = ViTConfig(image_size=64, patch_size=8, num_channels=1, num_labels=5, **size)
        return ViTForImageClassification(config)
    return BertForSequenceClassification(BertConfig(vocab_size=4096, max_position_embeddings=64, num_labels=6, **size))


BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
WITHOUT_CHOICES = {"split_heads": False, "choose_units": False, "stream_bases": False}
LITTLE = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}


def train(
    model: nn.Module, data: Mapping[str, Tensor], device: torch.device, epochs: int, rate: float, seed: int
) -> nn.Module:
    """The model trained in bfloat16, in float32 on the CPU."""
    model.to(device).train()
    columns = {name: tensor.to(device) for name, tensor in data.items()}
    order, batch = torch.Generator().manual_seed(seed), 128
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    steps = epochs * (len(data["labels"]) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.15)
    for _ in range(epochs):
        for rows in torch.randperm(len(data["labels"]), generator=order).split(batch):
            if len(rows) < batch:
                continue
            part = {name: tensor[rows.to(device)] for name, tensor in columns.items()}
            with torch.autocast(device.type, dtype=torch.bfloat16):
                loss = model(**part).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.cpu().eval()


@torch.no_grad()
def logits(model: nn.Module, data: Mapping[str, Tensor], device: torch.device, **kwargs: str) -> Tensor:
    model.to(device)
    inputs = {name: tensor for name, tensor in data.items() if name != "labels"}
    parts = [
        model(**{name: tensor[i : i + 256].to(device) for name, tensor in inputs.items()}, **kwargs).logits.cpu()
        for i in range(0, len(data["labels"]), 256)
    ]
    model.cpu()
    return torch.cat(parts)


def accuracy(found: Tensor, labels: Tensor) -> float:
    return float((found.argmax(-1) == labels).float().mean())


def now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def forward_seconds(experts: Mapping[str, nn.Module], data: Data, device: torch.device) -> float:
    """One forward pass of every expert over all calibration samples, in float32, the second time."""
    for model in experts.values():
        model.to(device)
    for _ in range(2):
        start = now(device)
        with torch.no_grad():
            for model in experts.values():
                for part in data.values():
                    for i in range(0, SAMPLES, 64):
                        model(**{name: x[i : i + 64].to(device) for name, x in part.items()})
        seconds = now(device) - start
    for model in experts.values():
        model.cpu()
    return seconds


def run_pair(pair: str, folder: Path, device: torch.device, epochs: int, rate: float, size: Mapping[str, int]) -> None:
    tests = {task: read(folder, pair, task, "test") for task in "ab"}
    data = {task: {n: x for n, x in read(folder, pair, task, "calibration").items() if n != "labels"} for task in "ab"}
    experts, start = {}, now(device)
    for seed, task in enumerate("ab", 1):
        experts[task] = train(
            new_model(pair, seed, size), read(folder, pair, task, "train"), device, epochs, rate, seed
        )
    parameters = sum(p.numel() for p in experts["a"].parameters()) / 1e6
    print(f"\n{pair}: two models of {parameters:.1f} M parameters, trained in {now(device) - start:.0f} s", flush=True)
    own = [accuracy(logits(experts[t], tests[t], device), tests[t]["labels"]) for t in "ab"]
    labels = torch.cat([tests["a"]["labels"], tests["b"]["labels"] + experts["a"].config.num_labels])
    beside = [torch.cat([logits(experts[t], tests[other], device) for t in "ab"], 1) for other in "ab"]
    print(f"experts: a {own[0]:.4f}  b {own[1]:.4f}  joint {accuracy(torch.cat(beside), labels):.4f}", flush=True)
    forward = forward_seconds(experts, data, device)
    print(f"one forward pass of both experts over {2 * SAMPLES} samples: {forward:.2f} s", flush=True)
    joint_heads = {"refit": {"joint_heads": True}}
    made = {}
    for name, settings in (
        ("average", {"method": "identity"}),
        ("default with joint heads", joint_heads),
        ("the same again", joint_heads),
    ):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = now(device)
        with timed_stages(partial(now, device)) as seconds:
            merged = merge(experts, data, accelerator=Accelerator(), **settings)
        total = now(device) - start
        made[name] = merged.state_dict()
        scores = [accuracy(logits(merged, tests[t], device, task=t), tests[t]["labels"]) for t in "ab"]
        joint = accuracy(torch.cat([logits(merged, tests[t], device) for t in "ab"]), labels)
        kept = sum(s / o for s, o in zip(scores, own, strict=True)) / 2
        peak = f", peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device.type == "cuda" else ""
        print(f"{name}: a {scores[0]:.4f}  b {scores[1]:.4f}  joint {joint:.4f}  kept {kept:.1%}; {total:.1f} s, "
              f"{total / forward:.1f} forward passes{peak}")  # fmt: skip
        print(
            "  " + ", ".join(f"{stage} {spent:.2f}" for stage, spent in seconds.items() if spent > 0.005), flush=True
        )
    _, first, again = made.values()
    other = [key for key, tensor in first.items() if not torch.equal(tensor, again[key])]
    print(f"of the two merges' {len(first)} tensors {len(other)} differ", flush=True)


def compare(pair: str, folder: Path, device: torch.device) -> None:
    """A small trained pair, merged on the CPU and on the device."""
    experts = {}
    for seed, task in enumerate("ab", 1):
        examples = read(folder, pair, task, "train")
        experts[task] = train(new_model(pair, seed, LITTLE), examples, device, 2, 1e-3, seed)
    data = {task: {n: x[:128] for n, x in read(folder, pair, task, "calibration").items()} for task in "ab"}
    for about, settings in (
        ("permute", {"method": "permute"}),
        ("permute + refit without choices", {"method": "permute", "refit": WITHOUT_CHOICES}),
        ("default", {}),
    ):
        merges = [merge(experts, data, accelerator=where, **settings) for where in (_OnCpu(), Accelerator())]
        found = [
            torch.cat([logits(merged, data[task], torch.device("cpu"), task=task) for task in "ab"])
            for merged in merges
        ]
        off, same = (found[0] - found[1]).abs().max(), (found[0].argmax(1) == found[1].argmax(1)).float().mean()
        print(f"{pair}, 3 x 64, {about}: the merges of the CPU and of {device.type} differ by at most {off:.1e} in a "
              f"logit (of at most {found[0].abs().max():.1f}), {same:.1%} of the answers are the same",
              flush=True)  # fmt: skip


class _OnCpu(Accelerator):
    """Accelerate has one device a process; this one is the CPU beside it."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", type=Path, help="write the data into this folder, and stop")
    parser.add_argument("--data", type=Path, help="the folder with the data")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--pairs", nargs="*", default=["vit", "bert"])
    parser.add_argument("--small", action="store_true", help="models of 3 x 64, to try the script")
    settings = parser.parse_args()
    disable_progress_bar()
    if settings.prepare:
        prepare(settings.prepare)
        return
    device = Accelerator().device
    name = torch.cuda.get_device_name() if device.type == "cuda" else str(device)
    print(f"{name}, torch {torch.__version__}")
    for pair in settings.pairs:
        compare(pair, settings.data, device)
    for pair in settings.pairs:
        rate = {"vit": 3e-4, "bert": 1e-4}[pair]
        run_pair(pair, settings.data, device, settings.epochs, rate, LITTLE if settings.small else BASE)


if __name__ == "__main__":
    main()
