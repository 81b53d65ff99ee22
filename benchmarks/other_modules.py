"""Models that are no classes of transformers: plain `torch.nn` modules, timm's, diffusers' and sentence-transformers'.

Each is a function that makes a small one and example inputs for it. Those of packages that are not installed are left
out. `coverage.py` tries them like classes of transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

Inputs = dict[str, Tensor]
Made = tuple[nn.Module, Inputs]

BATCH, CHANNELS, WIDTH, SIDE, STEPS = 2, 3, 16, 16, 5


class Sequential(nn.Sequential):
    """Modules one after the other, whose input has a name."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Attention(nn.Module):
    """`MultiheadAttention` between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x + self.attention(x, x, x, need_weights=False)[0])


class Recurrent(nn.Module):
    """A recurrent layer between two linear ones."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 24), nn.Linear(WIDTH, 4)
        self.hidden = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 24))
        self.recurrent = kind(24, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.recurrent(self.hidden(self.first(x)))[0])


class UNet(nn.Module):
    """Two steps down and two up, with skips that are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        widths = (8, 16, 24)
        self.down = nn.ModuleList(block(a, b) for a, b in zip((CHANNELS, *widths), widths, strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, 2) for a, b in ((24, 16), (16, 8)))
        self.joined = nn.ModuleList(block(2 * b, b) for b in (16, 8))
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for number, down in enumerate(self.down):
            x = down(x if number == 0 else functional.max_pool2d(x, 2))
            skips.append(x)
        for up, joined, skip in zip(self.up, self.joined, skips[-2::-1], strict=True):
            x = joined(torch.cat([skip, up(x)], 1))
        return self.out(x)


def block(before: int, after: int, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Module:
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), norm(after), nn.ReLU())


def network(norm: Callable[[int], nn.Module]) -> Made:
    """A convolutional one."""
    layers = (block(CHANNELS, 8, norm), block(8, 16, norm), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    return Sequential(*layers), pictures()


def encoder(norm_first: bool) -> Made:
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 24, batch_first=True, norm_first=norm_first)
    layers = (
        nn.Linear(WIDTH, WIDTH),
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        nn.Linear(WIDTH, 4),
    )
    return Sequential(*layers), rows()


def pictures(name: str = "x", side: int = SIDE) -> Inputs:
    return {name: torch.randn(BATCH, CHANNELS, side, side)}


def rows() -> Inputs:
    return {"x": torch.randn(BATCH, STEPS, WIDTH)}


PLAIN: dict[str, Callable[[], Made]] = {
    "nn.TransformerEncoder": lambda: encoder(False),
    "nn.TransformerEncoder, norms first": lambda: encoder(True),
    "nn.MultiheadAttention": lambda: (Attention(), rows()),
    "CNN, nn.BatchNorm2d": lambda: network(nn.BatchNorm2d),
    "CNN, nn.GroupNorm": lambda: network(lambda channels: nn.GroupNorm(4, channels)),
    "CNN, nn.InstanceNorm2d": lambda: network(lambda channels: nn.InstanceNorm2d(channels, affine=True)),
    "U-Net": lambda: (UNet(), pictures()),
    "nn.LSTM": lambda: (Recurrent(nn.LSTM), rows()),
    "nn.GRU": lambda: (Recurrent(nn.GRU), rows()),
}


def timm_model(name: str, **settings: object) -> Callable[[], Made]:
    def make() -> Made:
        import timm

        return timm.create_model(name, num_classes=3, **settings), pictures(side=32)

    return make


def wrapped_timm() -> Made:
    settings = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2}
    config = transformers.TimmWrapperConfig(architecture="vit_tiny_patch16_224", num_labels=3, model_args=settings)
    return transformers.TimmWrapperForImageClassification(config), pictures("pixel_values", 32)


class Embedding(nn.Module):
    """The modules of a `SentenceTransformer`, whose features are the arguments."""

    def __init__(self) -> None:
        from sentence_transformers.models import Dense, Normalize, Pooling

        super().__init__()
        sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 60}
        self.model = transformers.BertModel(transformers.BertConfig(num_hidden_layers=2, **sizes))
        self.pooling, self.dense, self.normalize = Pooling(32), Dense(32, 16), Normalize()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = self.model(input_ids, attention_mask).last_hidden_state
        features = self.pooling({"token_embeddings": tokens, "attention_mask": attention_mask})
        return self.normalize(self.dense(features))["sentence_embedding"]


def sentences() -> Made:
    ids = torch.randint(3, 60, (BATCH, STEPS))
    return Embedding(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def denoiser() -> Made:
    from diffusers import UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    sizes = {"block_out_channels": (16, 32), "norm_num_groups": 4, "attention_head_dim": 8, "layers_per_block": 1}
    model = UNet2DModel(sample_size=SIDE, **blocks, **sizes)
    return model, {**pictures("sample"), "timestep": torch.tensor([3, 7])}


def diffusion_transformer() -> Made:
    from diffusers import DiTTransformer2DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8, "patch_size": 2}
    model = DiTTransformer2DModel(in_channels=CHANNELS, out_channels=CHANNELS, norm_num_groups=4, **sizes)
    inputs = {"timestep": torch.tensor([3, 7]), "class_labels": torch.tensor([1, 2])}
    return model, {"hidden_states": torch.randn(BATCH, CHANNELS, 8, 8), **inputs}


OF_PACKAGES: dict[str, dict[str, Callable[[], Made]]] = {
    "timm": {
        "timm ViT": timm_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=32, num_heads=2),
        "timm ConvNeXt": timm_model("convnext_atto", depths=[1, 1, 1, 1], dims=[8, 16, 24, 32]),
        "timm ResNet": timm_model("resnet10t"),
        "TimmWrapperForImageClassification": wrapped_timm,
    },
    "sentence_transformers": {"SentenceTransformer's modules": sentences},
    "diffusers": {"diffusers UNet2DModel": denoiser, "diffusers DiTTransformer2DModel": diffusion_transformer},
}

OTHERS = {"torch": PLAIN, **{name: own for name, own in OF_PACKAGES.items() if find_spec(name) is not None}}
"""By package the models of it."""


def other(package: str, name: str) -> Made:
    """A small model in eval mode, seeded, and example inputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, inputs = OTHERS[package][name]()
        return model.eval(), inputs
