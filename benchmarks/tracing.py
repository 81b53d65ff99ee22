"""What tracing models of full size takes, whose weights are on the meta device: `python -m benchmarks.tracing`.

The memory is the largest resident one of the whole process, imports included.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from hf_zipit.symmetry import MergeSpec

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "BERT-large": lambda: BertForSequenceClassification(BertConfig(**LARGE)),
    "ViT-L": lambda: ViTForImageClassification(ViTConfig(**LARGE)),
    "Llama-3-8B": lambda: LlamaForCausalLM(
        LlamaConfig(
            hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=8, vocab_size=128256,
        )
    ),
}  # fmt: skip


def main() -> None:
    print("| model | parameters, millions | folded | seconds | CPU seconds | process, MiB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, build in MODELS.items():
        with torch.device("meta"):
            model = build()
        for folding in (False, True):
            wall, cpu = time.perf_counter(), time.process_time()
            MergeSpec.from_model(model, folding=folding)
            seconds = time.perf_counter() - wall, time.process_time() - cpu
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            folded = "yes" if folding else "no"
            cells = [
                name,
                f"{model.num_parameters() / 1e6:,.0f}",
                folded,
                *(f"{s:.1f}" for s in seconds),
                f"{memory:,}",
            ]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
