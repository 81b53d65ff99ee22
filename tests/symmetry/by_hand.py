"""Small modules written by hand, each with what must be inferred about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from hf_zipit.symmetry.spec import Symmetry

FIXED, PERMUTATION, LINEAR = Symmetry.FIXED, Symmetry.PERMUTATION, Symmetry.LINEAR
ONES, ORTHOGONAL = Symmetry.ORTHOGONAL_ONES, Symmetry.ORTHOGONAL
HALF_TURNS, ROTARY, NEIGHBOURS = Symmetry.HALF_TURNS, Symmetry.ROTARY, Symmetry.ROTARY_NEIGHBOURS

WIDTH = 8
HEADS, HEAD_DIM, GROUPS = 4, 3, 2


@dataclass(frozen=True)
class Case:
    """A function of the hidden units of a two-layer network.

    Attributes:
        function: takes the hidden tensor `[2, 5, WIDTH]`.
        symmetry: what must be inferred for the hidden units; several where their parts differ.
        tight: whether more than that would be wrong, so that the proof must fail with it.
        extra: parameters or buffers that the function takes by name.
    """

    function: Callable[..., Tensor]
    symmetry: Symmetry | tuple[Symmetry, ...]
    tight: bool = True
    extra: Mapping[str, Tensor] = field(default_factory=dict)


class Between(nn.Module):
    """Linear, a function of the hidden units, and a linear map back to the outside where the units are still there."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.first = nn.Linear(6, WIDTH)
        self.last = nn.Linear(WIDTH, 3)
        for name, tensor in case.extra.items():
            if tensor.is_floating_point():
                self.register_parameter(name, nn.Parameter(tensor.clone()))
            else:
                self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        y = self.case.function(self.first(x), **{name: getattr(self, name) for name in self.case.extra})
        return self.last(y) if y.shape[-1] == WIDTH else y


def spread(x: Tensor) -> Tensor:
    """An RMS norm as models write it by hand."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


def assigned(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[..., :4] = x[..., 4:]
    return y


def rows_written(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[torch.tensor([0, 1]), torch.tensor([3, 0])] = x[torch.tensor([1, 0]), torch.tensor([2, 2])]
    return y


def masked_rows_written(x: Tensor) -> Tensor:
    y, mask = torch.zeros_like(x), torch.tensor([[True, False, True, False, False], [False] * 4 + [True]])
    y[mask] = x[mask]
    return y


def number_written(x: Tensor) -> Tensor:
    y = x.clone()
    y[torch.tensor([0, 1]), torch.tensor([3, 0])] = 1.0
    return y


def copied(x: Tensor) -> Tensor:
    y = x.clone()
    y[..., :4].copy_(x[..., 4:])
    return y


def shaped_like_a_unit(x: Tensor) -> Tensor:
    return x.view(*x.softmax(-1)[..., 0].shape, WIDTH)


def slid(x: Tensor) -> Tensor:
    """A convolution over the hidden units."""
    kernel = torch.tensor([[[0.5, 1.0, -0.5]]])
    return F.conv1d(x.flatten(0, 1).unsqueeze(1), kernel, padding=1).squeeze(1).view(x.shape)


def squared_in_place(x: Tensor) -> Tensor:
    y = x.clone()
    length = y.view(2, 5, WIDTH).pow_(2).sum(-1, keepdim=True)
    return y / (1 + length)


def doubled_part(x: Tensor) -> Tensor:
    y = x.clone()
    y[..., :4].mul_(2)
    return y


def raised_token(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0].add_(1.0)
    return y


def over_channels(x: Tensor, norm: Callable[..., Tensor]) -> Tensor:
    """A norm that takes the tokens for channels and the hidden units for positions."""
    return norm(x.transpose(0, 1).reshape(5, 2, WIDTH).transpose(0, 1)).contiguous()


PAIRS = WIDTH // 2
FREQUENCIES = torch.tensor([1.0, 0.6, 0.3, 0.1])
ANGLES = torch.outer(torch.arange(5.0), FREQUENCIES)


def twice(angles: Tensor) -> Tensor:
    return torch.cat([angles, angles], -1)


def quarter_rotated(x: Tensor) -> Tensor:
    return torch.cat([-x[..., PAIRS:], x[..., :PAIRS]], -1)


def rotary(x: Tensor) -> Tensor:
    """A rotary embedding as Llama writes it."""
    angles = twice(x.new_ones(5, 1).cumsum(0) * FREQUENCIES)
    return x * angles.cos() + quarter_rotated(x) * angles.sin()


def neighbours_rotated(x: Tensor) -> Tensor:
    """A rotary embedding as GPT-J writes it."""
    angles = (x.new_ones(5, 1).cumsum(0) * FREQUENCIES).repeat_interleave(2, -1)
    rotated = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * angles.cos() + rotated * angles.sin()


def rotary_cut_after(x: Tensor) -> Tensor:
    """A rotary embedding whose result is cut in two, so that pairs are torn apart."""
    return rotary(x).view(2, 5, 2, PAIRS).softmax(-2).view(2, 5, WIDTH)


def rotary_cut_before(x: Tensor) -> Tensor:
    return rotary(x.view(2, 5, 2, PAIRS).contiguous().view(2, 5, WIDTH))


def scaled_and_rotated_by_head(x: Tensor, v: Tensor) -> Tensor:
    """What a rotary embedding does, with numbers that are a parameter of every head."""
    factors = twice(v[:, None])
    heads = x.view(2, 5, HEADS, 2)
    return (heads * factors + torch.cat([-heads[..., 1:], heads[..., :1]], -1) * factors).view(2, 5, WIDTH)


def rotary_with_learned_angles(x: Tensor, v: Tensor) -> Tensor:
    angles = (x.new_ones(5, 1).cumsum(0) * v).repeat(1, 2)
    return x * angles.cos() + quarter_rotated(x) * angles.sin()


def rotary_in_place(x: Tensor) -> Tensor:
    angles = twice(ANGLES.clone())
    return (x * angles.cos()).add_(quarter_rotated(x) * angles.sin())


def rotary_and_half(x: Tensor) -> Tensor:
    """A rotary embedding, one half of which is used for something else as well."""
    angles, first = twice(ANGLES.clone()), x[..., :PAIRS]
    rotated = torch.cat([-x[..., PAIRS:], first], -1)
    return (x * angles.cos() + rotated * angles.sin()) * (1 + first.sum(-1, keepdim=True).tanh())


def vector() -> Tensor:
    return torch.linspace(-1, 1, WIDTH).sin() + 0.1


ORDER = torch.tensor([3, 1, 2, 0, 7, 6, 5, 4])

CASES: dict[str, Case] = {
    # Linear in every unit.
    "identity": Case(lambda x: x, LINEAR),
    "twice": Case(lambda x: -2 * x / 3, LINEAR),
    "cast": Case(lambda x: x.to(torch.float64).to(torch.float32), LINEAR),
    "sum of two": Case(lambda x: x + x.roll(1, 1), LINEAR),
    "weighted tokens": Case(lambda x: x * torch.sigmoid(x.detach().sum(-1, keepdim=True) * 0 + 1), ONES, tight=False),
    "copied": Case(lambda x: torch.zeros_like(x).copy_(x), LINEAR),
    "rows written": Case(rows_written, LINEAR),
    "masked rows written": Case(masked_rows_written, LINEAR),
    "a number written": Case(number_written, PERMUTATION, tight=False),
    "from where a tensor says": Case(lambda x: x.narrow(1, torch.tensor(2), 2), LINEAR),
    "noise on the tokens": Case(lambda x: x * torch.rand(2, 5, 1), LINEAR),
    "read for nothing": Case(shaped_like_a_unit, LINEAR),
    "bias": Case(lambda x, b: x + b, LINEAR, extra={"b": vector()}),
    "mean of tokens": Case(lambda x: x.mean(1, keepdim=True), LINEAR),
    "square map": Case(lambda x, w: x + F.linear(x, w), LINEAR, extra={"w": torch.outer(vector(), vector().flip(0))}),
    "einsum with a weight": Case(
        lambda x, w: torch.einsum("btd,ed->bte", x, w), LINEAR, extra={"w": torch.outer(vector(), vector().cos())}
    ),
    "cast through float16's name": Case(lambda x: x.type_as(x), LINEAR),
    # Maps that keep the vector of ones.
    "plus one": Case(lambda x: x + 1, ONES),
    "one minus": Case(lambda x: 1 - x, ONES),
    "centred": Case(lambda x: x - x.mean(-1, keepdim=True), ONES),
    "layer norm without affine": Case(lambda x: F.layer_norm(x, (WIDTH,)), ONES),
    "variance": Case(lambda x: x.var(-1, keepdim=True) * x, ONES),
    "biased deviation": Case(lambda x: x * x.std(-1, correction=0, keepdim=True), ONES),
    "mean over everything": Case(lambda x: x.mean() * x, ONES),
    "sum of two axes": Case(lambda x: x.sum((1, 2), keepdim=True) * x, ONES),
    "mean without keeping": Case(lambda x: x.mean(-1).unsqueeze(-1), ONES),
    "filled": Case(lambda x: x.mean(1, keepdim=True) + x.clone().fill_(2.0), ONES),
    "one token in place": Case(raised_token, ONES),
    "number for every token": Case(lambda x: x + torch.sin(x.mean(-1, keepdim=True)), ONES),
    "linear over tokens with bias": Case(
        lambda x: F.linear(x.transpose(1, 2), torch.eye(5) + 0.3, torch.arange(5.0)).transpose(1, 2), ONES
    ),
    "linear over tokens": Case(lambda x: F.linear(x.transpose(1, 2), torch.eye(5) + 0.3).transpose(1, 2), LINEAR),
    # Rotations.
    "rms norm without affine": Case(lambda x: F.rms_norm(x, (WIDTH,)), ORTHOGONAL),
    "rms norm by hand": Case(spread, ORTHOGONAL),
    "rms norm by square": Case(lambda x: x * x.square().mean(-1, keepdim=True).rsqrt(), ORTHOGONAL),
    "length": Case(lambda x: x / x.norm(dim=-1, keepdim=True), ORTHOGONAL),
    "length of everything": Case(lambda x: x / torch.linalg.vector_norm(x), ORTHOGONAL),
    "product with itself": Case(lambda x: (x * x).sum(-1, keepdim=True) * x, ORTHOGONAL),
    "gram matrix": Case(lambda x: x @ x.transpose(1, 2), ORTHOGONAL),
    "read and written by one matrix": Case(
        lambda x, w: F.linear(F.linear(x, w), w.t()), LINEAR, extra={"w": vector().outer(vector().cos())}
    ),
    "tied weights": Case(
        lambda x, w: x + F.linear(F.linear(x, w), w.t()), ORTHOGONAL, extra={"w": vector().outer(vector().cos())}
    ),
    # Only the order.
    "product with a vector": Case(lambda x, v: x * v, PERMUTATION, extra={"v": vector()}),
    "sum of cubes": Case(lambda x: x.pow(3).sum(-1, keepdim=True) * x, PERMUTATION),
    "one-norm": Case(lambda x: x / x.norm(p=1, dim=-1, keepdim=True), PERMUTATION),
    "softmax": Case(lambda x: x.softmax(-1), PERMUTATION),
    "softmax of tokens": Case(lambda x: x.softmax(1), PERMUTATION),
    "layer norm": Case(lambda x, v: F.layer_norm(x, (WIDTH,), v), PERMUTATION, extra={"v": vector()}),
    "layer norm of tokens": Case(lambda x: F.layer_norm(x.transpose(1, 2), (5,)).transpose(1, 2), PERMUTATION),
    "batch norm over tokens": Case(
        lambda x: over_channels(x, lambda y: F.batch_norm(y, None, None, training=True)), PERMUTATION, tight=False
    ),
    "instance norm over tokens": Case(lambda x: over_channels(x, F.instance_norm), PERMUTATION, tight=False),
    "group norm over tokens": Case(lambda x: F.group_norm(x, 5), PERMUTATION, tight=False),
    "group norm": Case(lambda x: F.group_norm(x.transpose(1, 2), WIDTH).transpose(1, 2), PERMUTATION),
    "batch norm": Case(
        lambda x, v, m: F.batch_norm(x.transpose(1, 2), m, v.exp(), v, m).transpose(1, 2),
        PERMUTATION,
        extra={"v": vector(), "m": vector().cos()},
    ),
    "prelu": Case(lambda x, v: F.prelu(x.transpose(1, 2), v).transpose(1, 2), PERMUTATION, extra={"v": vector()}),
    "one over": Case(lambda x: 1 / (2 + x.cos()), PERMUTATION),
    "rounded quotient": Case(lambda x: torch.div(x, 0.1, rounding_mode="floor"), PERMUTATION),
    "cast to integers": Case(lambda x: (x * 10).long().float(), PERMUTATION),
    "clamped by a vector": Case(lambda x, v: torch.clamp(x, max=v), PERMUTATION, extra={"v": vector()}),
    "minimum of two": Case(lambda x, v: torch.min(x, v), PERMUTATION, extra={"v": vector()}),
    "maximum of two": Case(lambda x, v: torch.maximum(x, v), PERMUTATION, extra={"v": vector()}),
    "where": Case(lambda x, v: torch.where(x > v, x, v), PERMUTATION, extra={"v": vector()}),
    "masked": Case(lambda x: x.masked_fill(x > 0.2, -1.0), PERMUTATION),
    "masked by a constant": Case(lambda x, m: x.masked_fill(m, 0.0), PERMUTATION, extra={"m": ORDER > 3}),
    "lerp": Case(lambda x, v: torch.lerp(x, x.sin(), v), PERMUTATION, extra={"v": vector()}),
    "addcmul": Case(lambda x, v: torch.addcmul(v, x, x, value=2), PERMUTATION, extra={"v": vector()}),
    "largest": Case(lambda x: x * x.amax(-1, keepdim=True), PERMUTATION),
    "largest value only": Case(lambda x: x * x.max(-1, keepdim=True).values, PERMUTATION),
    "largest of everything": Case(lambda x: x * x.max(), PERMUTATION),
    "product of all": Case(lambda x: (x + 2).prod(-1).unsqueeze(-1) * 1e-2, PERMUTATION),
    "log of a sum": Case(lambda x: x.logsumexp(-1, keepdim=True), PERMUTATION),
    "largest over tokens": Case(lambda x: x.max(1).values.unsqueeze(1), PERMUTATION),
    "relu in place": Case(lambda x: x.clone().relu_(), PERMUTATION),
    "in place on a view": Case(lambda x: x.clone().view(10, WIDTH).sin_().view(2, 5, WIDTH), PERMUTATION),
    "squared in place": Case(squared_in_place, PERMUTATION),
    "max pooling over tokens": Case(lambda x: F.max_pool1d(x.transpose(1, 2), 2).transpose(1, 2), PERMUTATION),
    "average pooling over tokens": Case(lambda x: F.avg_pool1d(x.transpose(1, 2), 2).transpose(1, 2), LINEAR),
    "table of an integer buffer": Case(
        lambda x, ids: x * torch.arange(1.0, WIDTH + 1)[ids], FIXED, tight=False, extra={"ids": ORDER}
    ),
    # Rotations of pairs.
    "rotary embedding": Case(rotary, ROTARY),
    "rotary embedding, written the other way round": Case(
        lambda x: twice(ANGLES.clone()).sin() * quarter_rotated(x) + twice(ANGLES.clone()).cos() * x, ROTARY
    ),
    "rotary embedding, cast": Case(lambda x: rotary(x.to(torch.float64)).to(torch.float32), ROTARY),
    "rotary embedding, tiled and scaled": Case(
        lambda x: x * (ANGLES.clone().tile(2).cos() * 2) + quarter_rotated(x) * (ANGLES.clone().tile(2).sin() / 3),
        ROTARY,
    ),
    "rotary embedding, twice": Case(lambda x: rotary(rotary(x)), ROTARY),
    "rotary embedding, one angle for all": Case(
        lambda x: x * twice(ANGLES.clone())[1:2].cos() + quarter_rotated(x) * twice(ANGLES.clone())[1:2].sin(), ROTARY
    ),
    "rotary embedding and RMS norm": Case(lambda x: F.rms_norm(rotary(x), (WIDTH,)), ROTARY),
    "rotary embedding with learned angles": Case(rotary_with_learned_angles, ROTARY, extra={"v": vector()[:PAIRS]}),
    # Rotary embeddings that are not known, or not alone: nothing.
    "rotary embedding in place": Case(rotary_in_place, FIXED, tight=False),
    "rotary embedding, a number in between": Case(
        lambda x: x * twice(ANGLES.clone()).cos() * 2 + quarter_rotated(x) * twice(ANGLES.clone()).sin(),
        FIXED,
        tight=False,
    ),
    "rotary embedding of a part": Case(
        lambda x: torch.cat([quarter_rotated(x[..., :4]).repeat(1, 1, 2)[..., :4] + x[..., :4], x[..., 4:]], -1),
        LINEAR,
    ),
    "rotary embedding and one half": Case(rotary_and_half, FIXED),
    "rotary embedding and layer norm": Case(lambda x: F.layer_norm(rotary(x), (WIDTH,)), FIXED),
    "rotary embedding and nonlinearity": Case(lambda x: rotary(x).relu(), FIXED),
    "rotary embedding after a scale": Case(lambda x, v: rotary(x * v), HALF_TURNS, extra={"v": vector()}),
    "rotary embedding after a scaled RMS norm": Case(
        lambda x, v: rotary(F.rms_norm(x, (WIDTH,), v)), HALF_TURNS, extra={"v": vector()}
    ),
    "rotary embedding before a scale": Case(
        lambda x, v: (rotary(x).clone() * v).softmax(1), FIXED, extra={"v": vector()}
    ),
    "rotary embedding of neighbours": Case(neighbours_rotated, NEIGHBOURS),
    "rotary embedding of neighbours after a scale": Case(
        lambda x, v: neighbours_rotated(x * v), FIXED, extra={"v": vector()}, tight=False
    ),
    "rotated by angles that differ in a pair": Case(
        lambda x: x * torch.linspace(0, 3, WIDTH).cos() + quarter_rotated(x) * torch.linspace(0, 3, WIDTH).sin(), FIXED
    ),
    "halves swapped without a sign": Case(
        lambda x: (
            x * twice(ANGLES.clone()).cos() + torch.cat([x[..., 4:], x[..., :4]], -1) * twice(ANGLES.clone()).sin()
        ),
        FIXED,
    ),
    "halves under a nonlinearity": Case(
        lambda x: (
            x * twice(ANGLES.clone()).cos()
            + torch.cat([x[..., 4:].tanh(), x[..., :4]], -1) * twice(ANGLES.clone()).sin()
        ),
        FIXED,
    ),
    "sines that differ in a pair": Case(
        lambda x: x * twice(ANGLES.clone()).cos() + quarter_rotated(x) * torch.linspace(0, 3, WIDTH).sin(), FIXED
    ),
    "cosines that differ in a pair": Case(
        lambda x: x * torch.linspace(0, 3, WIDTH).cos() + quarter_rotated(x) * twice(ANGLES.clone()).sin(), FIXED
    ),
    "cosines with a scale for every unit": Case(
        lambda x: (
            x * (twice(ANGLES.clone()).cos() * torch.linspace(1, 2, WIDTH))
            + quarter_rotated(x) * twice(ANGLES.clone()).sin()
        ),
        FIXED,
    ),
    "cosines in another order": Case(
        lambda x, i: (
            x * twice(ANGLES.clone()).cos().index_select(-1, i) + quarter_rotated(x) * twice(ANGLES.clone()).sin()
        ),
        FIXED,
        extra={"i": ORDER},
    ),
    "another tensor's halves": Case(
        lambda x, w: x * twice(ANGLES.clone()).cos() + quarter_rotated(F.linear(x, w)) * twice(ANGLES.clone()).sin(),
        FIXED,
        tight=False,
        extra={"w": vector().outer(vector().cos())},
    ),
    # Nothing.
    "cumulative sum": Case(lambda x: x.cumsum(-1), FIXED),
    "flip": Case(lambda x: x.flip(-1), FIXED),
    "roll": Case(lambda x: x.roll(1, -1), FIXED),
    "roll of everything": Case(lambda x: x.roll(1), FIXED),
    "lower triangle": Case(lambda x: x.tril(), FIXED),
    "slice": Case(lambda x: x[..., 2:], FIXED),
    "single unit": Case(lambda x: x[..., 2], FIXED),
    "index": Case(lambda x: x[..., ORDER], FIXED),
    "index select": Case(lambda x, i: x.index_select(-1, i), FIXED, extra={"i": ORDER}),
    "gather": Case(lambda x: x.gather(-1, ORDER.expand(2, 5, WIDTH)), FIXED),
    "chunks": Case(lambda x: torch.cat(x.chunk(2, -1)[::-1], -1), LINEAR),
    "gated linear units": Case(lambda x: F.glu(x, -1).repeat(1, 1, 2), PERMUTATION, tight=False),
    "every second unit": Case(
        lambda x: torch.cat([x[..., ::2].relu(), x[..., 1::2].tanh()], -1), (PERMUTATION, FIXED), tight=False
    ),
    "tiled": Case(lambda x: x.tile(1, 1, 2)[..., :WIDTH], LINEAR, tight=False),
    "differences of rows": Case(lambda x: x.diff(dim=1), LINEAR),
    "windows of rows": Case(lambda x: x.unfold(1, 2, 1).sum(-1), LINEAR),
    "windows of channels, put back": Case(
        lambda x: F.fold(F.unfold(x.mT[..., None], (2, 1)), (5, 1), (2, 1))[..., 0].mT, LINEAR
    ),
    "unbound": Case(lambda x: torch.stack(x.unbind(-1)[::-1], -1), FIXED),
    "concatenated": Case(lambda x: torch.cat([x, x], -1), FIXED),
    "shifted by padding": Case(lambda x: F.pad(x, (1, -1)), FIXED),
    "padded": Case(lambda x: F.pad(x, (1, 1)), FIXED),
    "padded tokens": Case(lambda x: F.pad(x, (0, 0, 1, 1), value=1.0), ONES),
    "convolved over": Case(slid, FIXED),
    "pooled over": Case(lambda x: F.avg_pool1d(x, 2), FIXED),
    "place of the largest": Case(lambda x: x.max(-1).indices.float().unsqueeze(-1), FIXED),
    "largest, in their order": Case(lambda x: x * x.topk(3).values.sum(-1, keepdim=True), PERMUTATION),
    "places of the largest": Case(lambda x: x.topk(3).indices.float(), FIXED),
    "argmax": Case(lambda x: x.argmax(-1).float().unsqueeze(-1), FIXED),
    "with positions": Case(lambda x: x + torch.arange(WIDTH), FIXED),
    "assigned": Case(assigned, (FIXED, LINEAR), tight=False),
    "other units in place": Case(copied, LINEAR),
    "a part in place": Case(doubled_part, (LINEAR, FIXED), tight=False),
}
"""Every kind of rule, between two linear layers."""

UNKNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "aten.cummax": lambda x: x.cummax(-1).values,
    "aten.sort": lambda x: x.sort(-1).values,
    "aten.fft_rfft": lambda x: torch.fft.rfft(x).abs(),
    "aten.kthvalue": lambda x: x.kthvalue(3, keepdim=True).values,
    "aten.cdist": lambda x: torch.cdist(x, x),
    "aten.view.dtype": lambda x: x.view(torch.int32).float() * 1e-10,
}
"""Ops that have no rule, by the beginning of their names."""


class Attention(nn.Module):
    """Attention with every way to write it: `manual`, `sdpa`, `einsum`, `merged` (batch and heads in one axis)."""

    def __init__(self, kind: str = "manual", groups: int = HEADS) -> None:
        super().__init__()
        width = HEADS * HEAD_DIM
        self.kind, self.groups = kind, groups
        self.query = nn.Linear(6, width)
        self.key = nn.Linear(6, groups * HEAD_DIM)
        self.value = nn.Linear(6, groups * HEAD_DIM)
        self.out = nn.Linear(width, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            linear(x).view(*x.shape[:2], -1, HEAD_DIM).transpose(1, 2) for linear in (self.query, self.key, self.value)
        )
        if self.kind == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.groups < HEADS)
        else:
            k, v = (self.spread(t, HEADS // self.groups) for t in (k, v))
            y = getattr(self, self.kind)(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))

    @staticmethod
    def spread(x: Tensor, copies: int) -> Tensor:
        b, h, t, d = x.shape
        return x if copies == 1 else x[:, :, None].expand(b, h, copies, t, d).reshape(b, h * copies, t, d)

    @staticmethod
    def manual(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.transpose(-1, -2) / 2, -1) @ v

    @staticmethod
    def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k), -1)
        return torch.einsum("...qk,...kd->...qd", weights, v)

    @staticmethod
    def merged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        lead = q.shape[:2]
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        scores = torch.baddbmm(torch.zeros(1, 1, 1), q, k.transpose(1, 2), beta=0)
        return torch.bmm(scores.softmax(-1), v).unflatten(0, lead)


class Fused(nn.Module):
    """One linear layer for query, key and value, taken apart by `chunk`, within heads, by a view, or head by head."""

    def __init__(self, by: str) -> None:
        super().__init__()
        width = HEADS * HEAD_DIM
        self.by = by
        self.qkv = nn.Linear(6, 3 * width)
        self.out = nn.Linear(width, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.qkv(x)
        if self.by == "chunk":
            q, k, v = (t.unflatten(-1, (HEADS, HEAD_DIM)) for t in y.chunk(3, -1))
        elif self.by == "inner chunk":
            q, k, v = y.unflatten(-1, (HEADS, 3 * HEAD_DIM)).chunk(3, -1)
        elif self.by == "unbind":
            q, k, v = y.unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(2)
        elif self.by == "heads":
            y = y.view(2, 5, 3 * HEADS, HEAD_DIM)
            q, k, v = y[..., : -2 * HEADS, :], y[:, :, [*range(-2 * HEADS, -HEADS)]], y[..., 2 * HEADS :, :]
        else:
            y = y.view(2, 5, HEADS, 3, HEAD_DIM).transpose(1, 3)
            q, k, v = (y[:, i].transpose(1, 2) for i in range(3))
        y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        return self.out(y.transpose(1, 2).flatten(2))


class Windows(nn.Module):
    """Hidden units at positions in overlapping windows, which share memory."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)  # [2, 8, 16]
        return self.down(hidden.as_strided((2, 3, 4, 16), (8 * 16, 2 * 16, 16, 1)))


class Routed(nn.Module):
    """Experts of which a router chooses some for every token, whose weights are looked up.

    `by`: what the choice is for: the experts' weights; nothing but its own values; numbers that are counted with.
    """

    def __init__(self, by: str = "weights", ordered: bool = True, experts: int = 5, chosen: int = 2) -> None:
        super().__init__()
        self.by, self.ordered, self.chosen = by, ordered, chosen
        self.first = nn.Linear(6, WIDTH)
        self.router = nn.Linear(WIDTH, experts)
        self.up = nn.Parameter(torch.randn(experts, 7, WIDTH))
        self.shift = nn.Parameter(torch.randn(experts, 7))
        self.down = nn.Parameter(torch.randn(experts, WIDTH, 7))
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).flatten(0, 1)
        shares, numbers = self.router(x).softmax(-1).topk(self.chosen, sorted=self.ordered)
        if self.by == "numbers":
            shares = shares * (1 + numbers)
        rows = x.repeat_interleave(self.chosen, 0).unsqueeze(-1)
        numbers = numbers.flatten()
        hidden = (self.up[numbers] @ rows).squeeze(-1) + self.shift[numbers]
        if self.by == "next":  # tokens meet while every one of them still has its own expert's units
            hidden = hidden + hidden.roll(1, 0)
        y = (self.down[numbers] @ hidden.relu().unsqueeze(-1)).squeeze(-1) * shares.reshape(-1, 1)
        y = y.view(len(x), self.chosen, WIDTH)
        return self.last(x + (y[:, 0] - 2 * y[:, 1] if self.by == "order" else y.sum(1)))


class Gated(nn.Module):
    """One linear layer for a gate and what it gates, and a concatenation of it with the input."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.Linear(6, 2 * WIDTH)
        self.last = nn.Linear(WIDTH + 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.fused(x).chunk(2, -1)
        return self.last(torch.cat([x, gate.sigmoid() * up], -1))


class HeadMixing(nn.Module):
    """A hidden width cut into heads, with an op in which the heads may meet."""

    def __init__(self, function: Callable[[Tensor], Tensor], out: int) -> None:
        super().__init__()
        self.function = function
        self.first = nn.Linear(6, HEADS * HEAD_DIM)
        self.last = nn.Linear(out, 3)
        self.pick = nn.Parameter(torch.randn(HEADS))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.first(x).unflatten(-1, (HEADS, HEAD_DIM))
        heads = heads * self.pick[:, None]  # so that heads can be reordered at most
        return self.last(self.function(heads))


def gram_of_heads(x: Tensor) -> Tensor:
    return (x @ x.transpose(-1, -2)).flatten(2)


def heads_attend(x: Tensor) -> Tensor:
    return (torch.softmax(x @ x.transpose(-1, -2), -1) @ x).flatten(2)


def linear_heads_attend(x: Tensor) -> Tensor:
    scores = torch.sigmoid(torch.einsum("bthd,btgd->bthg", x, x))
    return torch.einsum("bthg,btgd->bthd", scores, x).flatten(2)


def outer_of_heads(x: Tensor) -> Tensor:
    return (x.unsqueeze(-2) * x.unsqueeze(-3)).sum(-2).flatten(2)


MIXING: dict[str, tuple[Callable[[Tensor], Tensor], int, bool]] = {
    "nothing": (lambda x: x.flatten(2), HEADS * HEAD_DIM, True),
    "relu": (lambda x: x.relu().flatten(2), HEADS * HEAD_DIM, True),
    "norm in every head": (lambda x: F.rms_norm(x, (HEAD_DIM,)).flatten(2), HEADS * HEAD_DIM, True),
    "gram matrix": (gram_of_heads, HEADS * HEADS, False),
    "attention among heads": (heads_attend, HEADS * HEAD_DIM, False),
    "einsum among heads": (linear_heads_attend, HEADS * HEAD_DIM, False),
    "products among heads": (outer_of_heads, HEADS * HEAD_DIM, False),
    "sum of heads": (lambda x: x.sum(-2), HEAD_DIM, False),
    "minus the mean head": (lambda x: (x - x.mean(-2, keepdim=True)).flatten(2), HEADS * HEAD_DIM, False),
    "softmax over heads": (lambda x: x.softmax(-2).flatten(2), HEADS * HEAD_DIM, False),
    "norm over heads": (lambda x: F.layer_norm(x.transpose(2, 3), (HEADS,)).flatten(2), HEADS * HEAD_DIM, False),
    "next head": (lambda x: (x + x.roll(1, 2)).flatten(2), HEADS * HEAD_DIM, False),
    "looked up heads": (lambda x: (x + x[:, :, [2, 0, 3, 1]]).flatten(2), HEADS * HEAD_DIM, False),
    "heads of heads": (lambda x: (x + x[:, :, 1:2]).flatten(2), HEADS * HEAD_DIM, False),
    "cumulative heads": (lambda x: x.cumsum(2).flatten(2), HEADS * HEAD_DIM, False),
    "shared bias": (lambda x: (x + torch.arange(3.0)).flatten(2), HEADS * HEAD_DIM, False),
    "heads last": (lambda x: x.transpose(2, 3).flatten(2), HEADS * HEAD_DIM, True),
}
"""What heads may do to each other; the width of the result; whether every head keeps a basis of its own."""


class TwoCuts(nn.Module):
    """A width of 96 that is cut into 8 x 12 in one place and 12 x 8 in another."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 96)
        self.last = nn.Linear(96, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        rows = y.unflatten(-1, (8, 12)).softmax(-1).flatten(2)
        columns = y.unflatten(-1, (12, 8)).softmax(-1).flatten(2)
        return self.last(rows + columns)


class ResidualStream(nn.Module):
    """A pre-norm stream whose norms have no affine part: only linear maps and the norm touch it."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.embed = nn.Linear(6, WIDTH)
        self.up = nn.ModuleList(nn.Linear(WIDTH, 11) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(11, WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(up(self.norm(x)).relu())
        return self.head(self.norm(x))


class Convolutional(nn.Module):
    """Ordinary, grouped, depthwise and pointwise convolutions with batch and group norms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=4)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.widening = nn.Conv2d(12, 24, 3, padding=1, groups=12)
        self.gn = nn.GroupNorm(4, 24)
        self.point = nn.Conv2d(24, 6, 1, stride=2)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)), inplace=True)
        x = F.relu6(self.depthwise(F.gelu(self.grouped(x))))
        x = self.point(F.silu(self.gn(self.widening(x))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Unbatched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, WIDTH)
        self.conv = nn.Conv1d(5, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.first(x)[0]) + self.conv(self.first(x)[1])


class LearnedQueries(nn.Module):
    """Queries that come from a table through an integer buffer, and are averaged in the end."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.register_buffer("rows", torch.tensor([4, 1, 6, 2]))
        self.key = nn.Linear(6, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.table(self.rows)
        weights = torch.softmax(self.key(x) @ queries.t(), 1)
        return self.out((weights.transpose(1, 2) @ x).relu().mean(1))


class TiedBuffers(nn.Module):
    """Two modules with one scale buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.first.register_buffer("scale", vector())
        self.second.register_buffer("scale", self.first.scale)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) * self.first.scale
        return self.last(x + self.second(x) * self.second.scale)


class Mixer(nn.Module):
    """An MLP over tokens with biases, beside a stream whose norm would allow any rotation."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, WIDTH)
        self.tokens = nn.Linear(5, 5)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.rms_norm(self.embed(x), (WIDTH,))
        return self.head(F.rms_norm(x + self.tokens(x.mT).mT, (WIDTH,)))


class WeightNormed(nn.Module):
    """Lengths for every unit, for every place of a kernel, and of a grouped kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.first = weight_norm(nn.Linear(6, WIDTH))
        self.conv = weight_norm(nn.Conv1d(WIDTH, WIDTH, 3, padding=1), dim=2)
        self.grouped = weight_norm(nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=2), dim=2)
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.first(x).mT.relu())
        return self.last(F.gelu(self.grouped(x)).mT)


class NoGrad(nn.Module):
    """A part of the forward pass runs in a subgraph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False), torch.no_grad():
            y = self.first(x).relu()
        return self.last(y)


WHOLE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{f"attention, {k}": (lambda k=k: Attention(k), (2, 5, 6)) for k in ("manual", "sdpa", "einsum", "merged")},
    "grouped queries, sdpa": (lambda: Attention("sdpa", groups=GROUPS), (2, 5, 6)),
    "grouped queries, manual": (lambda: Attention("manual", groups=GROUPS), (2, 5, 6)),
    "fused, chunk": (lambda: Fused("chunk"), (2, 5, 6)),
    "fused, inside the heads": (lambda: Fused("inner chunk"), (2, 5, 6)),
    "gate and input": (Gated, (2, 5, 6)),
    "experts": (Routed, (2, 5, 6)),
    "experts, in no order": (lambda: Routed(ordered=False), (2, 5, 6)),
    "experts, whose order counts": (lambda: Routed("order"), (2, 5, 6)),
    "experts, whose numbers count": (lambda: Routed("numbers"), (2, 5, 6)),
    "experts, whose tokens meet": (lambda: Routed("next"), (2, 5, 6)),
    "fused, view": (lambda: Fused("view"), (2, 5, 6)),
    "two cuts": (TwoCuts, (2, 5, 6)),
    "convolutions": (Convolutional, (2, 3, 8, 8)),
    "unbatched convolution": (Unbatched, (2, 5, 6)),
    "learned queries": (LearnedQueries, (2, 5, 6)),
    "tied buffers": (TiedBuffers, (2, 5, 6)),
    "mixer": (Mixer, (2, 5, 6)),
    "weight norms": (WeightNormed, (2, 5, 6)),
    "no grad": (NoGrad, (2, 5, 6)),
    "rms stream": (lambda: ResidualStream(nn.RMSNorm(WIDTH, elementwise_affine=False)), (2, 5, 6)),
    "layer norm stream": (lambda: ResidualStream(nn.LayerNorm(WIDTH, elementwise_affine=False)), (2, 5, 6)),
    **{f"heads: {name}": (lambda f=f, out=out: HeadMixing(f, out), (2, 5, 6)) for name, (f, out, _) in MIXING.items()},
}
"""Whole modules, with the shape of their input."""
