"""Every rule against a straightforward reference, written from the equations of its paper, and its traps."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_zipit.combine.matrices import view_of
from hf_zipit.combine.ranks import order_statistics
from hf_zipit.combine.rules.della import probabilities
from hf_zipit.combine.rules.mats import conjugate_gradients
from hf_zipit.errors import RecipeError
from hf_zipit.registry import RULES
from hf_zipit.symmetry.spec import Factor
from tests.combine.data import Data

HELD, READ = (Factor("a"),), (Factor("b", dual=True),)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


BASE = draw(7, 5, seed=9)
EXPERTS = [BASE + scale * draw(7, 5, seed=seed) for seed, scale in enumerate((0.3, 0.5, 0.2))]


DATA = Data.draw(3, 7, 5)


def combined(name: str, experts: list[Tensor], base: Tensor = BASE, labels: object = (), **options: object) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    given = DATA.given(experts) if base.numel() == BASE.numel() and len(experts) == 3 else {}
    return RULES.get(name).combine(experts, labels, None, options, base=base, generator=generator, **given)


# References: from the experts' task vectors as numpy arrays to the merged task vector.

D = [(expert - BASE).numpy() for expert in EXPERTS]


def top(x: np.ndarray, share: float) -> np.ndarray:
    kept = np.sort(np.abs(x).ravel())[::-1][: max(math.ceil(share * x.size), 1)]
    return np.where(np.abs(x) >= kept[-1], x, 0)


def ties(ds: list[np.ndarray], share: float, scale: float) -> np.ndarray:
    trimmed = [top(d, share) for d in ds]
    out = np.zeros_like(ds[0])
    for place in np.ndindex(out.shape):
        sign = np.sign(sum(d[place] for d in trimmed))
        agreeing = [d[place] for d in trimmed if np.sign(d[place]) == sign and sign]
        out[place] = scale * np.mean(agreeing) if agreeing else 0
    return out


def breadcrumbs(ds: list[np.ndarray], smallest: float, largest: float, scale: float) -> np.ndarray:
    total = np.zeros_like(ds[0])
    for d in ds:
        order = np.argsort(np.abs(d), axis=None)
        for place in order[int(smallest * d.size) : d.size - int(largest * d.size)]:
            total.flat[place] += scale * d.flat[place]
    return total


def model_stock(ds: list[np.ndarray]) -> np.ndarray:
    count = len(ds)
    pairs = [(a, b) for i, a in enumerate(ds) for b in ds[i + 1 :]]
    cosine = np.mean([(a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs])
    return count * cosine / ((count - 1) * cosine + 1) * np.mean(ds, axis=0)


def consensus(ds: list[np.ndarray], threshold: float, least: int, scale: float) -> np.ndarray:
    total = sum(ds)
    masks = sum((np.abs(d) >= threshold * np.abs(total - d)).astype(int) for d in ds)
    return scale * np.where(masks >= least, total, 0)


def pcb(ds: list[np.ndarray], share: float, scale: float) -> np.ndarray:
    count, size = len(ds), ds[0].size
    clamped, weights = [], []
    for d in ds:
        ordered = np.sort(np.abs(d).ravel())
        magnitudes = np.clip(np.abs(d), ordered[int(size * 1e-4)], ordered[int(size * (1 - 1e-4)) - 1])
        clamped.append(np.sign(d) * magnitudes)
        own = (magnitudes - magnitudes.min()) / (magnitudes.max() - magnitudes.min())
        competing = np.exp(count * own**2) * np.tanh(d * sum(ds))
        cut = np.sort(competing.ravel())[int(size * (1 - share))]
        competing = np.clip(competing, cut, None)
        weights.append((competing - cut) / (competing.max() - cut))
    return scale * sum(w * d for w, d in zip(weights, clamped, strict=True)) / np.maximum(sum(weights), 1e-12)


def polar(x: np.ndarray) -> np.ndarray:
    u, _, v = np.linalg.svd(x, full_matrices=False)
    return u @ v


def tsv_m(ds: list[np.ndarray], scale: float) -> np.ndarray:
    k = min(ds[0].shape) // len(ds)
    parts = [np.linalg.svd(d, full_matrices=False) for d in ds]
    u, v = np.hstack([p[0][:, :k] for p in parts]), np.vstack([p[2][:k] for p in parts])
    return scale * polar(u) @ np.diag(np.concatenate([p[1][:k] for p in parts])) @ polar(v)


def iso_c(ds: list[np.ndarray], scale: float) -> np.ndarray:
    u, s, v = np.linalg.svd(sum(ds), full_matrices=False)
    return scale * s.mean() * u @ v


def iso_cts(ds: list[np.ndarray], common: float, scale: float) -> np.ndarray:
    rank = min(ds[0].shape)
    own = round((rank - int(rank * common)) / len(ds))
    u, s, v = np.linalg.svd(sum(ds), full_matrices=False)
    kept = rank - own * len(ds)
    us, ss, vs = [u[:, :kept]], [s[:kept]], [v[:kept]]
    for d in ds:
        left = np.linalg.svd(d - us[0] @ us[0].T @ d, full_matrices=False)
        us.append(left[0][:, :own]), ss.append(left[1][:own]), vs.append(left[2][:own])
    return scale * np.concatenate(ss).mean() * polar(np.hstack(us)) @ polar(np.vstack(vs))


def cart(ds: list[np.ndarray], share: float, scale: float) -> np.ndarray:
    mean, rank = np.mean(ds, axis=0), int(share * min(ds[0].shape))
    total = mean.copy()
    for d in ds:
        u, s, v = np.linalg.svd(d - mean, full_matrices=False)
        total += scale * u[:, :rank] @ np.diag(s[:rank]) @ v[:rank]
    return total


def actmat(ds: list[np.ndarray]) -> np.ndarray:
    return sum(d @ d.T @ d for d in ds) @ np.linalg.inv(sum(d.T @ d for d in ds))


def wudi(ds: list[np.ndarray]) -> np.ndarray:
    weights = [1 / np.linalg.norm(d) ** 2 for d in ds]
    gram = sum(w * d.T @ d for w, d in zip(weights, ds, strict=True)) + 1e-8 * np.eye(ds[0].shape[1])
    return sum(w * d @ d.T @ d for w, d in zip(weights, ds, strict=True)) @ np.linalg.inv(gram)


def ace(ds: list[np.ndarray], ridge: float) -> np.ndarray:
    eye = np.eye(ds[0].shape[1])
    centred = [d - d.mean(0) for d in ds]
    grams = [c.T @ c + ridge * eye for c in centred]
    logs = np.log([np.linalg.norm(d) ** 2 for d in ds])
    if logs.var() / logs.mean() ** 2 > 0.3:
        grams = [g / np.trace(c.T @ c) for g, c in zip(grams, centred, strict=True)]
    return sum(d @ g for d, g in zip(ds, grams, strict=True)) @ np.linalg.inv(sum(grams) + ridge * eye)


def svc(ds: list[np.ndarray], merged: np.ndarray, floor: float) -> np.ndarray:
    u, s, v = np.linalg.svd(merged, full_matrices=False)
    out = np.zeros_like(merged)
    for r in range(len(s)):
        response = u[:, r] @ merged
        shares = [max(floor, response @ (u[:, r] @ d) / np.linalg.norm(u[:, r] @ d) ** 2) for d in ds]
        out += s[r] * len(ds) / sum(shares) * np.outer(u[:, r], v[r])
    return out


def regmean(ws: list[np.ndarray], xs: list[np.ndarray], share: float) -> np.ndarray:
    grams = [x.T @ x / len(x) for x in xs]
    grams = [np.where(np.eye(len(g)) > 0, g, share * g) for g in grams]
    return sum(w @ g for w, g in zip(ws, grams, strict=True)) @ np.linalg.inv(sum(grams))


def featcal(
    ws: list[np.ndarray], bs: list[np.ndarray], anchors: tuple[np.ndarray, np.ndarray], blend: float, ridge: float
) -> tuple[np.ndarray, np.ndarray]:
    """As the paper writes it, weights stored `[in, out]`."""
    left, right, total = ridge * np.eye(5), ridge * anchors[0].T, 0.0
    inputs = []
    for w, x, z in zip(ws, X, Z, strict=True):
        mixed = blend * z + (1 - blend) * x
        c, k = x.T @ x / len(x), x.T @ mixed / len(x)
        size = 1 / np.linalg.norm(c)
        left, right, total = left + size * c, right + size * k @ w.T, total + size
        inputs.append((size, x.mean(0), mixed.mean(0)))
    solved = np.linalg.solve(left, right)
    lacking = [s * (b + m @ w.T - x @ solved) for w, b, (s, x, m) in zip(ws, bs, inputs, strict=True)]
    return solved.T, (sum(lacking) + ridge * anchors[1]) / (total + ridge)


X, Z = ([part.numpy() for part in parts] for parts in (DATA.x, DATA.z))
W = [expert.numpy() for expert in EXPERTS]
F = [own.numpy() for own in DATA.fisher]
ZEROS = [np.zeros(7)] * 3

CASES: dict[str, tuple[str, dict[str, object], Callable[[], np.ndarray]]] = {
    "task-arithmetic": ("task-arithmetic", {"scale": 0.3}, lambda: 0.3 * sum(D)),
    "weighted": ("weighted", {"weights": [1.0, 2.0, 5.0]}, lambda: (D[0] + 2 * D[1] + 5 * D[2]) / 8),
    "ties": ("ties", {"share": 0.3, "scale": 0.9}, lambda: ties(D, 0.3, 0.9)),
    "ties by default": ("ties", {}, lambda: ties(D, 0.2, 1.0)),
    "breadcrumbs": (
        "breadcrumbs", {"smallest": 0.5, "largest": 0.1, "scale": 0.4}, lambda: breadcrumbs(D, 0.5, 0.1, 0.4)
    ),
    "model-stock": ("model-stock", {}, lambda: model_stock(D)),
    "consensus": ("consensus", {"scale": 0.5}, lambda: consensus(D, 0.4, 2, 0.5)),
    "pcb": ("pcb", {"share": 0.4, "scale": 1.2}, lambda: pcb(D, 0.4, 1.2)),
    "tsv-m": ("tsv-m", {"scale": 1.1}, lambda: tsv_m(D, 1.1)),
    "iso-c": ("iso-c", {"scale": 1.3}, lambda: iso_c(D, 1.3)),
    "iso-cts": ("iso-cts", {"common": 0.4}, lambda: iso_cts(D, 0.4, 1.0)),
    "cart": ("cart", {"share": 0.5, "scale": 0.5}, lambda: cart(D, 0.5, 0.5)),
    "actmat": ("actmat", {}, lambda: actmat(D)),
    "wudi": ("wudi", {}, lambda: wudi(D)),
    "ace": ("ace", {"ridge": 1e-3}, lambda: ace(D, 1e-3)),
    "regmean": ("regmean", {"share": 0.8}, lambda: regmean(W, Z, 0.8) - BASE.numpy()),
    "regmean++": ("regmean++", {}, lambda: regmean(W, X, 0.9) - BASE.numpy()),
    "mats": ("mats", {}, lambda: regmean(W, Z, 1.0) - BASE.numpy()),
    "lot": ("lot", {}, lambda: regmean(D, Z, 1.0)),
    "fisher": (
        "fisher", {"floor": 1e-9}, lambda: sum(f * w for f, w in zip(F, W, strict=True)) / sum(F) - BASE.numpy()
    ),
    "featcal": (
        "featcal", {"options": {"scale": 0.3}, "blend": 0.4, "reach": 1.7, "ridge": 0.1},
        lambda: featcal(W, ZEROS, (BASE.numpy() + 1.7 * 0.3 * sum(D), ZEROS[0]), 0.4, 0.1)[0] - BASE.numpy(),
    ),
    "svc after task arithmetic": ("svc", {"floor": 0.2}, lambda: svc(D, 0.4 * sum(D), 0.2)),
    "svc after ties": (
        "svc", {"after": "ties", "options": {"share": 0.5}}, lambda: svc(D, ties(D, 0.5, 1.0), 0.5)
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_rule_is_its_equation(case: str):
    name, options, reference = CASES[case]
    expected = BASE + torch.from_numpy(reference())
    torch.testing.assert_close(combined(name, EXPERTS, **options), expected, rtol=1e-8, atol=1e-8)


def test_every_rule_has_a_reference():
    others = {"average", "slerp", "karcher", "dare", "dare-ties", "della"}
    assert {name for name, _, _ in CASES.values()} | others == set(RULES.names())


def test_energies_that_differ_are_made_equal_by_ace():
    """|d|^2 of about e^1 and e^-7: the small expert counts as much as the large one."""
    small = [BASE + 0.3 * draw(7, 5, seed=1), BASE + 0.005 * draw(7, 5, seed=2)]
    expected = BASE + torch.from_numpy(ace([(x - BASE).numpy() for x in small], 1e-8))
    torch.testing.assert_close(combined("ace", small, ridge=1e-8), expected, rtol=1e-8, atol=1e-8)


# On what layers are fed.


def test_the_bias_of_a_calibrated_layer_makes_up_for_what_is_left():
    biases = [draw(7, seed=20 + t) for t in range(3)]
    start = draw(7, seed=30)
    anchor = start + 2.0 * 0.4 * sum(b - start for b in biases)
    reached = BASE.numpy() + 2.0 * 0.4 * sum(D)
    weight, expected = featcal(W, [b.numpy() for b in biases], (reached, anchor.numpy()), 0.3, 0.05)
    layer = DATA.layer(EXPERTS, biases).bias(torch.from_numpy(weight))
    given = {"base": start, "generator": None, "layer": layer}
    found = RULES.get("featcal").combine(biases, (HELD,), None, {}, **given)
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-8, atol=1e-8)


def test_a_norm_is_calibrated_unit_by_unit():
    """Without a ridge the scale and shift are the least-squares ones of all tasks' rows."""
    scales, shifts = ([draw(5, seed=seed + t) for t in range(3)] for seed in (40, 50))
    layer = DATA.layer(scales, shifts, norm=True)
    given = {"base": scales[0], "generator": None}
    options = {"ridge": 1e-12, "blend": 1.0}
    scale = RULES.get("featcal").combine(scales, (HELD,), None, options, layer=layer, **given)
    shift = RULES.get("featcal").combine(shifts, (HELD,), None, options, layer=layer.bias(scale), **given)
    for unit in range(5):
        x = np.concatenate([part[:, unit] for part in X])
        rows = zip(Z, scales, shifts, strict=True)
        y = np.concatenate([float(a[unit]) * part[:, unit] + float(b[unit]) for part, a, b in rows])
        expected = np.linalg.lstsq(np.stack([x, np.ones_like(x)], 1), y, rcond=None)[0]
        np.testing.assert_allclose([float(scale[unit]), float(shift[unit])], expected, rtol=1e-7)
    options = {"ridge": 1e-12, "blend": 1.0}
    alone = RULES.get("featcal").combine(scales, (HELD,), None, options, layer=DATA.layer(scales, norm=True), **given)
    expected = sum(s.numpy() * (x * z).mean(0) for s, x, z in zip(scales, X, Z, strict=True))
    np.testing.assert_allclose(alone, expected / sum(x**2 for x in X).mean(0), rtol=1e-7)


def test_a_norm_of_lot_is_weighted_by_the_squares_of_its_inputs():
    grams = [draw(5, seed=t).square() for t in range(3)]
    scales = [draw(5, seed=40 + t) for t in range(3)]
    found = RULES.get("lot").combine(scales, (HELD,), None, {}, base=BASE[0], grams=grams)
    torch.testing.assert_close(found, sum(g * s for g, s in zip(grams, scales, strict=True)) / sum(grams))


def test_conjugate_gradients_take_the_steps_that_are_asked_for():
    matrix, right, start = sum(DATA.grams), draw(1, 5, seed=8), torch.zeros(1, 5, dtype=torch.float64)
    steepest = right * float(right.square().sum() / (right @ matrix @ right.T))
    torch.testing.assert_close(conjugate_gradients(matrix, right, start, 1), steepest)
    exact = torch.linalg.solve(matrix, right.T).T
    torch.testing.assert_close(conjugate_gradients(matrix, right, start, 5), exact, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["regmean", "regmean++", "lot", "mats"])
def test_inputs_that_are_never_seen_change_nothing(name: str):
    """Two inputs that are always zero: they keep the base's weights, or the mean's."""
    seen = torch.tensor([1.0, 1, 1, 0, 0]).double()
    data = Data([x * seen for x in DATA.x], [z * seen for z in DATA.z], DATA.fisher)
    found = RULES.get(name).combine(EXPERTS, (), None, {}, base=BASE, **data.given(EXPERTS))
    expected = BASE if name == "lot" else sum(EXPERTS) / 3
    torch.testing.assert_close(found[:, 3:], expected[:, 3:], rtol=1e-9, atol=1e-9)
    assert (found - expected)[:, :3].abs().max() > 1e-3


# On the sphere.


def test_slerp_goes_along_the_arc():
    x, y = torch.tensor([3.0, 0.0]).double(), torch.tensor([0.0, 3.0]).double()
    third = combined("slerp", [x, y], at=1 / 3)
    torch.testing.assert_close(third, 3 * torch.tensor([math.cos(math.pi / 6), math.sin(math.pi / 6)]).double())
    assert torch.equal(combined("slerp", [x, y], at=0.0), x)
    with pytest.raises(RecipeError, match="for two experts, not 3; 'karcher'"):
        combined("slerp", EXPERTS)


def test_the_karcher_mean_is_where_the_angles_cancel():
    mean = combined("karcher", EXPERTS).flatten()
    unit = mean / mean.norm()
    steps = []
    for expert in EXPERTS:
        own = expert.flatten() / expert.norm()
        across = own - (own @ unit) * unit
        steps.append((own @ unit).arccos() * across / across.norm())
    assert sum(steps).norm() < 1e-9
    assert float(mean.norm()) == pytest.approx(np.mean([float(x.norm()) for x in EXPERTS]))
    equal = [x / x.norm() for x in EXPERTS[:2]]
    torch.testing.assert_close(combined("karcher", equal), combined("slerp", equal), rtol=1e-9, atol=1e-9)


# What is drawn.


@pytest.mark.parametrize("name", ["dare", "dare-ties", "della"])
def test_what_is_dropped_is_made_up_for_on_average(name: str):
    one = BASE + 1.0
    options = {"drop": 0.6, "scale": 1.0}
    large = [x.repeat(200, 20) for x in (one, BASE)]
    vector = combined(name, large[:1], large[1], **options) - large[1]
    assert float((vector == 0).double().mean()) == pytest.approx(0.6, abs=0.01)
    assert float(vector.mean()) == pytest.approx(1.0, abs=0.03)
    assert torch.equal(vector, combined(name, large[:1], large[1], **options) - large[1])


def test_dare_is_its_equation():
    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(7, 5, generator=generator, dtype=torch.float64) >= 0.5 for _ in EXPERTS]
    kept = [mask.numpy() * d / 0.5 for mask, d in zip(masks, D, strict=True)]
    assert np.allclose(combined("dare", EXPERTS, drop=0.5, scale=0.4) - BASE, 0.4 * sum(kept))
    assert np.allclose(combined("dare-ties", EXPERTS, drop=0.5) - BASE, ties(kept, 1.0, 1.0))


def test_della_drops_small_entries_of_a_row_more_often():
    vector = torch.tensor([[3.0, -1.0, 2.0], [0.1, 0.3, -0.2]])
    torch.testing.assert_close(probabilities(vector, 0.5, 0.2), torch.tensor([[0.4, 0.6, 0.5], [0.6, 0.4, 0.5]]))


# Which tensors are matrices.


@pytest.mark.parametrize("name", ["tsv-m", "iso-c", "iso-cts", "cart", "actmat", "wudi", "ace", "regmean", "mats"])
def test_matrices_are_found_by_their_labels(name: str):
    """One weight in three layouts; what reads nothing is averaged."""
    expected = combined(name, EXPERTS, labels=(HELD, READ))
    turned = combined(name, [x.T for x in EXPERTS], BASE.T, labels=(READ, HELD))
    torch.testing.assert_close(turned, expected.T, rtol=1e-9, atol=1e-9)
    patches = [x.reshape(7, 1, 5, 1) for x in (*EXPERTS, BASE)]
    unfolded = combined(name, patches[:3], patches[3], labels=(HELD, READ, (), ()))
    torch.testing.assert_close(unfolded, expected.reshape(7, 1, 5, 1), rtol=1e-9, atol=1e-9)
    for labels in ((HELD, HELD), (HELD, ())):  # a table, a depthwise convolution
        torch.testing.assert_close(combined(name, EXPERTS, labels=labels), sum(EXPERTS) / 3)
    vectors = [x[0] for x in EXPERTS]
    torch.testing.assert_close(combined(name, vectors, BASE[0], labels=(HELD,)), sum(vectors) / 3)


def test_a_transposed_matrix_comes_back():
    view = view_of(BASE, (READ, HELD))
    assert torch.equal(view.tensor(view.matrix(BASE), BASE), BASE)
    assert view.matrix(BASE).shape == (5, 7)


@pytest.mark.parametrize("name", ["tsv-m", "iso-c", "iso-cts", "actmat", "wudi", "svc"])
def test_directions_that_nobody_learnt_stay_the_base(name: str):
    """Task vectors of rank one, as of an adapter: what is orthogonal to both is not touched."""
    u, v = draw(7, 2, seed=4), draw(2, 5, seed=5)
    experts = [BASE + torch.outer(u[:, t], v[t]) for t in range(2)]
    change = combined(name, experts) - BASE
    outside = torch.linalg.svd(v)[2][2:].T
    assert (change @ outside).abs().max() < 1e-6
    assert torch.linalg.matrix_rank(change, rtol=1e-6) <= 2


# Order statistics.


@pytest.mark.parametrize("pieces", [1, 4])
def test_order_statistics_are_those_of_a_sort(pieces: int):
    vector = torch.cat(
        [draw(300, seed=2), -1e-30 * torch.arange(20.0), torch.zeros(5), torch.full((7,), 2.5)]
    ).double()
    positions = [0, 3, 17, 160, len(vector) - 8, len(vector) - 1]
    other = -vector * 1e6
    parts = list(zip(vector.chunk(pieces), other.chunk(pieces), strict=True))
    found = order_statistics(parts, lambda size: positions)
    assert found == [vector.sort().values[positions].tolist(), other.sort().values[positions].tolist()]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ties", {"share": 0.0}, "ties's option share is 0.0; it must be above 0 and at most 1"),
        ("dare", {"drop": 1.0}, "dare's option drop is 1.0; it must be from 0 to less than 1"),
        ("della", {"drop": 0.95, "spread": 0.2}, "they must be from 0 to less than 1"),
        ("breadcrumbs", {"smallest": 0.9, "largest": 0.2}, "smallest and largest is 1.1"),
        ("weighted", {"weights": [1.0]}, "has 1 numbers for 3 experts"),
        ("weighted", {"weights": [1.0, -1.0, 0.0]}, "adds up to 0"),
        ("tsv-m", {"share": 2.0}, "share is 2.0"),
        ("svc", {"after": "svc"}, "name the rule of weights alone that it goes on from"),
        ("featcal", {"after": "svc"}, "name the rule of weights alone"),
        ("featcal", {"after": "regmean"}, "name the rule of weights alone"),
        ("regmean", {"share": 1.5}, "share is 1.5"),
        ("mats", {"steps": 0}, "steps is 0; it must be above 0"),
        ("fisher", {"weights": [1.0]}, "give 3 numbers above 0"),
        ("svc", {"after": "ties", "options": {"shar": 1.0}}, "did you mean 'share'"),
        ("svc", {"after": "tise"}, "did you mean 'ties'"),
    ],
)
def test_options_out_of_range_are_told(name: str, options: dict, message: str):
    with pytest.raises(RecipeError, match=message):
        combined(name, EXPERTS, **options)
