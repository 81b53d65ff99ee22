"""Small experts with hand-written probes, shared by the tests of this folder."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, ViTConfig, ViTForImageClassification

from hf_zipit.symmetry.spec import MergeSpec, Probe, ProductKey, Space, Symmetry

HIDDEN: ProductKey = ("hidden",)


class MLP(nn.Module):
    """Inputs [B, 5] or [B, S, 5]; changes the first layer's output in place, as many CNNs do."""

    main_input_name = "x"

    def __init__(self, width: int = 6, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.act, self.last = nn.Linear(5, width), nn.ReLU(inplace=True), nn.Linear(width, 3)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        return self.last(self.act(self.first(x)))


def spec_of(*probes: Probe, **sizes: int) -> MergeSpec:
    spaces = {name: Space(name, size, Symmetry.PERMUTATION) for name, size in sizes.items()}
    return MergeSpec("Test", spaces, {}, probes=probes)


MLP_SPEC = spec_of(Probe("last", "input", -1, HIDDEN), hidden=6)
"""The hidden units of `MLP`, read after the activation."""

PRE_SPEC = spec_of(Probe("first", "output", -1, HIDDEN), hidden=6)
"""The same units before the activation, which overwrites them in place."""


def mlps() -> dict[str, MLP]:
    return {"clothes": MLP(seed=1), "shoes": MLP(seed=2)}


def hidden(experts: dict[str, MLP], x: Tensor) -> Tensor:
    """Concatenated hidden features [rows, T*d] in float64."""
    with torch.no_grad():
        rows = [torch.relu(expert.first(x)).reshape(-1, expert.first.out_features) for expert in experts.values()]
    return torch.cat(rows, 1).double()


def covariance(features: Tensor) -> Tensor:
    return torch.cov(features.T, correction=0)


def vit(seed: int) -> ViTForImageClassification:
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4
    )
    return ViTForImageClassification(config)


def vit_spec(model: ViTForImageClassification) -> MergeSpec:
    """The residual stream after both blocks, and the hidden units of both MLPs."""
    outs = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.in_features == 24]
    blocks = [n for n, m in model.named_modules() if n.split(".")[-1].isdigit() and len(list(m.children())) > 1]
    assert len(outs) == len(blocks) == 2
    stream = [Probe(name, "output", -1, ("stream",)) for name in blocks]
    mlp = [Probe(name, "input", -1, (f"mlp{i}",)) for i, name in enumerate(outs)]
    return spec_of(*stream, *mlp, stream=16, mlp0=24, mlp1=24)


def bert(seed: int) -> BertModel:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, pad_token_id=0
    )
    return BertModel(config)


BERT_SPEC = spec_of(
    Probe("encoder.layer.0.output.dense", "input", -1, ("mlp",)),
    Probe("encoder.layer.0", "output", -1, ("stream",)),
    Probe("pooler.dense", "output", -1, ("pooled",)),
    mlp=24,
    stream=16,
    pooled=16,
)
