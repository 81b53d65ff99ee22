"""Merges from files to files: seconds and anonymous memory, for models that are larger than the memory they are given.

    python -m benchmarks.larger_than_memory                      # all of it, about 10 GB of disk
    python -m benchmarks.larger_than_memory bert-linear          # one row
    python -m benchmarks.larger_than_memory --mergekit PYTHON    # mergekit beside it, by the Python of its environment
    python -m benchmarks.larger_than_memory encoder-linear encoder-ties --sentence-transformers PYTHON

Every merge runs in a process of its own. Its anonymous memory (`RssAnon`: what cannot be dropped and read again from a
file) is sampled from outside, every few milliseconds; what the imports hold is told beside it. The experts are random
and written without ever being held: sharded safetensors files, the Llama-shaped ones in bfloat16.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from benchmarks.programs import HF_ZIPIT, MERGEKIT, SCALE, SENTENCE_TRANSFORMERS, Program
from hf_zipit.assembly.to_disk import write_shards

LLAMA = LlamaConfig(
    hidden_size=2048, intermediate_size=5632, num_hidden_layers=14, num_attention_heads=16, num_key_value_heads=4,
    vocab_size=32000, max_position_embeddings=2048,
)  # fmt: skip
SHAPES: dict[str, tuple[type[PreTrainedModel], Any, torch.dtype]] = {
    "bert": (BertForSequenceClassification, BertConfig(), torch.float32),
    "encoder": (BertModel, BertConfig(), torch.float32),
    "llama": (LlamaForCausalLM, LLAMA, torch.bfloat16),
}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-linear": ("bert", {"method": "identity", "combine": "task-arithmetic"}),
    "bert-ties": ("bert", {"method": "identity", "combine": "ties"}),
    "encoder-linear": ("encoder", {"method": "identity", "combine": "task-arithmetic"}),
    "encoder-ties": ("encoder", {"method": "identity", "combine": "ties"}),
    "llama-average": ("llama", {"method": "identity"}),
    "llama-linear": ("llama", {"method": "identity", "combine": "task-arithmetic"}),
    "llama-weights": ("llama", {"method": "weights", "options": {"sweeps": 1}}),
}
"""By name the shape of the experts and the settings of the merge. Rules on task vectors get a base."""

BY_MERGEKIT: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "task_arithmetic", "parameters": {"normalize": False, "weight": SCALE}},
    "ties": {"merge_method": "ties", "parameters": {"normalize": True, "weight": 1.0, "density": 0.2}},
}
"""By the end of a row's name what mergekit is told for the same; its TIES trims every tensor, ours the whole model.
sentence-transformers merges by mergekit."""

MIB = 2**20


class Noise(Mapping[str, Tensor]):
    """Random tensors of a model by name, the same whenever they are asked for."""

    def __init__(self, like: PreTrainedModel, seed: int) -> None:
        self.like, self.seed = like.state_dict(), seed

    def __getitem__(self, name: str) -> Tensor:
        like = self.like[name]
        if not like.is_floating_point():
            return torch.arange(like.numel()).reshape(like.shape)
        generator = torch.Generator().manual_seed(self.seed + 1000 * list(self.like).index(name))
        noise = torch.randn(like.shape, generator=generator) * 0.02
        return noise if like.dim() > 1 else 1 + noise

    def __iter__(self) -> Iterator[str]:
        return iter(self.like)

    def __len__(self) -> int:
        return len(self.like)


def write_expert(folder: Path, shape: str, seed: int) -> None:
    """Write a random model of a shape, in files of at most 500 MB."""
    model_class, config, dtype = SHAPES[shape]
    with torch.device("meta"):
        empty = model_class(config).to(dtype)
    config.architectures, config.dtype = [model_class.__name__], str(dtype).removeprefix("torch.")
    folder.mkdir()
    config.save_pretrained(folder)
    noise = Noise(empty, seed)
    write_shards(folder, empty, lambda name: [noise[name]], "500MB")
    words = Tokenizer(WordLevel({"[UNK]": 0, "[PAD]": 1}, unk_token="[UNK]"))  # encoders of sentences have one
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)


def tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a folder's files, one at a time."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            yield from ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118


def right(out: Path, experts: Mapping[str, str], base: str) -> str:
    """How many of the base model's tensors task arithmetic made right, in what a merge wrote."""
    found = {name.removeprefix("trunk."): tensor for name, tensor in tensors(out)}
    of_experts = [dict(tensors(Path(path))) for path in experts.values()]
    count = good = 0
    for name, start in tensors(Path(base)):
        if not start.is_floating_point() or name.startswith(("classifier", "lm_head")):
            continue
        count += 1
        expected = start.float() + SCALE * sum(own[name].float() - start.float() for own in of_experts)
        room = torch.finfo(found[name].dtype).eps * expected.abs().max() * 4 if name in found else 0
        good += name in found and bool((found[name].float() - expected).abs().max() <= room)
    return f"{good} of {count}"


def programs(
    row: str, experts: Mapping[str, str], base: Mapping[str, str], given: argparse.Namespace
) -> dict[str, tuple[Program, dict[str, Any]]]:
    """By the title of its row every program that does a merge, with its settings."""
    found = {row: (Program(HF_ZIPIT), {"experts": experts, **base, **ROWS[row][1]})}
    told, models = BY_MERGEKIT.get(row.rpartition("-")[2]), list(experts.values())
    if told and given.mergekit:
        config = {**told, "models": [{"model": path} for path in models], "base_model": base["base"]}
        found[f"{row}, mergekit"] = Program(MERGEKIT, given.mergekit), {"config": config}
    if told and given.sentence_transformers and row.startswith("encoder"):
        how = {"method": told["merge_method"], "parameters": told["parameters"], "base_model": base["base"]}
        program = Program(SENTENCE_TRANSFORMERS, given.sentence_transformers)
        found[f"{row}, sentence-transformers"] = program, {"models": models, **how}
    return found


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) // MIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rows", nargs="*", default=list(ROWS), help=f"of {', '.join(ROWS)}; all by default")
    parser.add_argument("--folder", type=Path, help="where the models go, and stay; a temporary folder by default")
    parser.add_argument("--mergekit", help="the Python of an environment that has mergekit, to run it beside")
    parser.add_argument("--sentence-transformers", help="that of one with sentence-transformers and its extra, merge")
    given = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as room:
        root = given.folder or Path(room)
        root.mkdir(exist_ok=True)
        print(
            "| merge | experts + base, MiB | merged, MiB | seconds | CPU seconds | peak, MiB | beyond imports, MiB "
            "| tensors right |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for row in given.rows:
            shape, settings = ROWS[row]
            names = ("a", "b", "base") if "combine" in settings else ("a", "b")
            for seed, name in enumerate(names):
                if not (root / f"{shape}-{name}").is_dir():
                    write_expert(root / f"{shape}-{name}", shape, seed)
            experts = {name: str(root / f"{shape}-{name}") for name in names}
            base = {"base": experts.pop("base")} if "base" in experts else {}
            read = sum(size(root / f"{shape}-{name}") for name in names)
            for title, (program, asked) in programs(row, experts, base, given).items():
                out = root / f"merged-{title}"
                (found,) = program.run([{**asked, "output_dir": str(out)}])
                if found["error"]:
                    print(f"| {title} | {found['error']} |", flush=True)
                    continue
                cells = [title, f"{read:,}", f"{size(out):,}"]
                cells += [f"{found['seconds']:.1f}", f"{found['cpu_seconds']:.1f}"]
                cells += [f"{found['peak_mib']:,}", f"{found['peak_mib'] - found['import_mib']:,}"]
                cells += [right(out, experts, base["base"]) if row.endswith("linear") else ""]
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
