"""`speech`: Wav2Vec2s that say which digit every frame of a call belongs to, in two codes. A hard pair.

The key at a call's beginning is not asked for, but whatever follows has to be compared with it. The labels of the
frames are known here, so that the experts learn them frame by frame where others would need CTC's sum over alignments.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Generator, Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Wav2Vec2Config, Wav2Vec2ForCTC

from benchmarks.zoo.pair import IGNORED, Metric, Splits, Tensors
from benchmarks.zoo.recipe import Recipe, Schedule
from benchmarks.zoo.sources import calls

SAMPLES = {"train": 16_000, "validation": 500, "test": 500}
CODES = dict(zip("ab", calls.CODES, strict=True))
KERNELS, STRIDES = (10, 3, 3, 2), (5, 2, 2, 2)


class Speech(Recipe):
    name = "speech"
    about = "Wav2Vec2 (convolutions and post-LN), digits of frames in calls of tones and of chirps"
    model_class = Wav2Vec2ForCTC
    schedule = Schedule(epochs=1, batch_size=16, learning_rate=1e-3, weight_decay=0.01)
    seeds = {"a": 121, "b": 122}

    def splits(self, tokenizer: PreTrainedTokenizerBase | None) -> Splits:
        return {task: {split: _calls(task, split) for split in SAMPLES} for task in self.seeds}

    def untrained(self, task: str, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedModel:
        off = ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "final_dropout")
        return Wav2Vec2ForCTC(
            Wav2Vec2Config(
                vocab_size=len(calls.DIGITS),
                hidden_size=128,
                num_hidden_layers=4,
                num_attention_heads=4,
                intermediate_size=256,
                conv_dim=[64] * len(KERNELS),
                conv_kernel=list(KERNELS),
                conv_stride=list(STRIDES),
                num_conv_pos_embeddings=16,
                num_conv_pos_embedding_groups=4,
                apply_spec_augment=False,
                layerdrop=0.0,
                pad_token_id=None,
                bos_token_id=None,
                eos_token_id=None,
                **dict.fromkeys(off, 0.0),
            )
        )

    def metric(self, tokenizer: PreTrainedTokenizerBase | None) -> Metric:
        return Metric("frame accuracy")

    def loss(self, model: PreTrainedModel, batch: Tensors) -> Tensor:
        logits = model(batch["input_values"]).logits
        return cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED)


def middles(samples: int) -> Tensor:
    """The sample in the middle of what every frame hears."""
    first, step, frames = 0, 1, samples
    for kernel, stride in zip(KERNELS, STRIDES, strict=True):
        first, step, frames = first + step * (kernel - 1), step * stride, (frames - kernel) // stride + 1
    return first // 2 + step * torch.arange(frames)


@cache
def _calls(task: str, split: str) -> Tensors:
    """A split's calls, every frame with the digit at its middle."""
    heard, said = calls.calls(CODES[task], SAMPLES[split], Generator().manual_seed(list(SAMPLES).index(split)))
    return {"input_values": heard, "labels": said[:, middles(calls.LENGTH)]}
