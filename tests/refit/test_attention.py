"""Attention in the refit: which layers are solved as a whole, and that heads are compared by what they compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import combinations, product
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers as T
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.vit.modeling_vit import ViTAttention

from benchmarks.smallest import smallest_model
from hf_zipit import merge
from hf_zipit.adapters import adapter_for
from hf_zipit.modeling import head_dims
from hf_zipit.modeling.head_dims import pair_units
from hf_zipit.refit import (
    RefitConfig,
    RefitReport,
    attention_refinement,
    attention_solver,
    head_biases,
    splitting,
    walk,
)
from hf_zipit.refit.attention import find_attention
from hf_zipit.refit.chosen_heads import best_groups
from hf_zipit.refit.fit import Fit, relative_errors
from hf_zipit.refit.head_factors import (
    Metric,
    logit_factors,
    nearest_basis,
    nearest_phases,
    pair_energies,
    rotary_factors,
    value_factors,
)
from hf_zipit.refit.mlp_solver import left_over
from hf_zipit.refit.program import Program, resized_copy
from hf_zipit.refit.solvable import RefitSite, find_sites
from hf_zipit.refit.solvers import solve_linear
from hf_zipit.refit.splitting import find_splits, is_proven, narrower
from hf_zipit.refit.values import MERGED
from hf_zipit.symmetry.group import apply_element, random_element
from hf_zipit.symmetry.proof import model_tensors
from hf_zipit.symmetry.spec import MergeSpec, Symmetry, fitted

from .. import tiny
from ..test_invariants import calibration, case, outputs, with_tensors

HEAD_DIM = 4


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(size: int, seed: int = 1) -> Tensor:
    root = drawn(size, size, seed=seed)
    return root @ root.mT / size


def metrics() -> tuple[Metric, Metric]:
    return Metric.of(moment(9), 0.0), Metric.of(moment(7), 0.0)


def lost(product: Tensor, query: Tensor, key: Tensor, left: Tensor, right: Tensor) -> float:
    """The mean square error of the logits over independent pairs of inputs with the given moments."""
    off = product - query.mT @ key
    return float(torch.trace(off.mT @ left @ off @ right))


HEADS = 2
"""This many query heads share the keys of one."""


def rotary_products(query: Tensor, key: Tensor, angle: float) -> Tensor:
    """The logits' bilinear form where every pair of units is turned by a multiple of an angle, `[heads, n, m]`."""
    half = key.shape[0] // 2
    turns = angle * torch.arange(1, half + 1, dtype=torch.float64)[:, None]
    one, other = key[:half], key[half:]
    turned = torch.cat([one * turns.cos() - other * turns.sin(), other * turns.cos() + one * turns.sin()])
    return query.mT @ turned


def products(kind: str, query: Tensor, key: Tensor) -> Tensor:
    """What queries and keys say, of every angle there is."""
    if kind == "plain":
        return query.mT @ key
    return torch.stack([rotary_products(query, key, angle) for angle in (0.0, 0.3, 1.1, 2.5)])


FACTORS = {"plain": lambda *args: logit_factors(*args, HEAD_DIM), "rotary": rotary_factors}


@pytest.mark.parametrize("kind", FACTORS)
def test_experts_with_the_same_logits_keep_them(kind: str):
    """Whatever basis each expert has inside its head, or angle each pair of units is turned by."""
    query, key = drawn(HEADS, HEAD_DIM, 9, seed=2), drawn(HEAD_DIM, 7, seed=3)
    if kind == "plain":
        basis = drawn(HEAD_DIM, HEAD_DIM, seed=4)
        other = basis @ query, torch.linalg.inv(basis).mT @ key
    else:
        pairs = torch.polar(torch.ones(HEAD_DIM // 2, dtype=torch.float64), drawn(HEAD_DIM // 2, seed=4))
        basis = torch.cat([torch.cat([pairs.real.diag(), -pairs.imag.diag()], 1),
                           torch.cat([pairs.imag.diag(), pairs.real.diag()], 1)])  # fmt: skip
        other = basis @ query, basis @ key
    found = FACTORS[kind]([query, other[0]], [key, other[1]], *metrics())
    torch.testing.assert_close(products(kind, found.query, found.key), products(kind, query, key))
    assert found.lost < 1e-12 * found.energy


@pytest.mark.parametrize("kind", FACTORS)
def test_factors_are_found_in_the_combined_ones_basis(kind: str):
    """However they were turned, they come back to where they are nearest to others; their products stay."""
    query, key = drawn(HEADS, HEAD_DIM, 9, seed=2), drawn(HEAD_DIM, 7, seed=3)
    found = FACTORS[kind]([query], [key], *metrics())
    if kind == "plain":  # a rotation alone does not make their lengths equal
        one, other = nearest_basis(found.query, found.key, (found.query, found.key))
        torch.testing.assert_close((one, other), (found.query, found.key))
    else:
        one, other = nearest_phases(found.query, found.key, (query, key))
        assert float((one * query).sum()) == pytest.approx(float(one.norm() * query.norm()), rel=0.2)
    torch.testing.assert_close(products(kind, one, other), products(kind, query, key))


def test_no_other_factors_of_the_rank_lose_less():
    queries, keys = [drawn(1, HEAD_DIM, 9, seed=s) for s in (2, 3)], [drawn(HEAD_DIM, 7, seed=s) for s in (4, 5)]
    left, right = moment(9), moment(7)
    product = (queries[0][0].mT @ keys[0] + queries[1][0].mT @ keys[1]) / 2
    found = logit_factors(queries, keys, *metrics(), HEAD_DIM)
    (query,), key = found.query, found.key
    least = lost(product, query, key, left, right)
    assert least > 0
    experts = [q[0].mT @ k for q, k in zip(queries, keys, strict=True)]
    assert found.lost == pytest.approx(sum(lost(own, query, key, left, right) for own in experts) / 2)
    assert found.energy == pytest.approx(sum(lost(own, query * 0, key, left, right) for own in experts) / 2)
    for seed in range(20):
        other = query + 0.05 * drawn(*query.shape, seed=seed), key + 0.05 * drawn(*key.shape, seed=seed + 99)
        assert lost(product, *other, left, right) > least
    # Twice the rank is enough for two experts.
    wide = logit_factors(queries, keys, *metrics(), 2 * HEAD_DIM)
    torch.testing.assert_close(wide.query[0].mT @ wide.key, product)


def test_no_other_rotary_pairs_lose_less():
    """Over all angles, of which the logits' share of a pair is a turn."""
    queries, keys = [drawn(HEADS, 2, 9, seed=s) for s in (2, 3)], [drawn(2, 7, seed=s) for s in (4, 5)]
    left, right = moment(9), moment(7)
    angles = torch.linspace(0, 2 * torch.pi, 13)[:-1].tolist()

    def missed(query: Tensor, key: Tensor) -> float:
        total = 0.0
        for angle in angles:
            for own, asked in zip(queries, keys, strict=True):
                off = rotary_products(own, asked, angle) - rotary_products(query, key, angle)
                total += float(torch.einsum("hij,jk,hlk,li->", off, right, off, left))
        return total / len(angles)

    found = rotary_factors(queries, keys, *metrics())
    least = missed(found.query, found.key)
    assert found.lost * 2 == pytest.approx(2 * least, rel=1e-6) or found.lost == pytest.approx(least, rel=1e-6)
    for seed in range(20):
        query, key = drawn(*found.query.shape, seed=seed), drawn(*found.key.shape, seed=seed + 99)
        assert missed(found.query + 0.05 * query, found.key + 0.05 * key) > least


def test_the_energies_of_pairs_are_those_of_the_logits():
    query, key = drawn(HEADS, HEAD_DIM, 9, seed=2), drawn(HEAD_DIM, 7, seed=3)
    energies = pair_energies(query, key, *metrics())
    assert float(energies.sum()) == pytest.approx(rotary_factors([query], [key], *metrics()).energy)
    units = pair_units([1], HEAD_DIM)
    assert float(energies[1]) == pytest.approx(rotary_factors([query[:, units]], [key[units]], *metrics()).energy)


def test_values_of_full_rank_are_the_solution_and_of_less_the_nearest():
    slope, covariance = drawn(6, 8, seed=2), moment(8)
    out, mix = value_factors(slope, Metric.of(covariance, 0.0), 8)
    torch.testing.assert_close(out @ mix, slope)
    out, mix = value_factors(slope, Metric.of(covariance, 0.0), HEAD_DIM)
    off = slope - out @ mix
    least = float(torch.trace(off @ covariance @ off.mT))
    singular = torch.linalg.svdvals(slope @ torch.linalg.cholesky(covariance))
    assert least == pytest.approx(float(singular[HEAD_DIM:].square().sum()))


WHOLE = {"vit": 2, "clip": 4, "bert-masked": 2, "distilbert-masked": 2, "roberta-prelayernorm": 2, "segformer": 8,
         "bart": 6, "llama": 2, "phi3": 2, "gpt2": 2, "resnet-basic": 0, "mpnet": 2, "vit-eager": 2}  # fmt: skip
"""Layers by class whose logits are bilinear in their inputs, whatever is added to them,"""

VALUES = {"qwen3": 2, "gpt-neox": 2, "deberta-v2": 2}
"""and those where a norm, a rotation of some units or positions that depend on queries and keys are in between."""


@pytest.mark.parametrize(
    ("model_class", "layers"),
    [(T.DINOv3ViTModel, 2), (T.DebertaModel, 0), (T.MLCDVisionModel, 0), (T.Sam3ViTModel, 0)],
)
def test_layers_of_other_kinds(model_class: type[PreTrainedModel], layers: int):
    """The frequencies of a rotation are on the way, and are no map's; to DeBERTa's values a bias is added later; and
    what MLCD's heads put out has positions before samples, and what SAM 3's read has rows and columns.
    """
    model = smallest_model(model_class)
    spec = MergeSpec.from_model(model)
    program = Program(model, fitted(adapter_for(model).inputs(model), model), adapter_for(model).outputs(model))
    found = list(find_attention(program, find_sites(program, frozenset(spec.axes), spec.head), spec, {}))
    assert [layer.logits for layer in found] == ["rotary"] * layers


@pytest.mark.parametrize(("name", "layers"), tiny.mostly_seldom([*WHOLE.items(), *VALUES.items()], 2))
def test_which_layers_are_solved_as_a_whole(name: str, layers: int):
    """Of the others values and output projections are, even where they are part of a fused map."""
    model = tiny.build(name)
    spec = MergeSpec.from_model(model)
    program = Program(model, fitted(adapter_for(model).inputs(model), model), adapter_for(model).outputs(model))
    found = list(find_attention(program, find_sites(program, frozenset(spec.axes), spec.head), spec, {}))
    assert len(found) == layers
    rotary = name in ("llama", "phi3")
    for layer in found:
        assert layer.logits == (None if name in VALUES else "rotary" if rotary else "plain")
        maps = {(own.site.weight, own.units[0]) for own in (layer.query, layer.key, layer.value) if own.count}
        assert len(maps) == (1 if name in VALUES else 3)
        assert layer.value.count == layer.groups * layer.width
        assert layer.fused == (name == "gpt-neox")


@pytest.mark.parametrize("name", ["vit", "bert-sequence", "llama", "gpt2"])
@pytest.mark.parametrize("refit", [False, True])
def test_a_change_of_basis_inside_heads_is_seen_through(name: str, refit: bool):
    """Without alignment: what is inside the heads does not fit at all, and its mean is another model."""
    model = case(name).model
    spec = MergeSpec.from_model(model)
    element = random_element(spec, torch.Generator().manual_seed(3))
    inside = {n: g for n, g in element.items() if spec.spaces[n].symmetry is Symmetry.LINEAR}
    reparametrised = with_tensors(model, apply_element(model_tensors(model), spec, inside))
    data = calibration(model)
    settings = RefitConfig(ridge=1e-3, micro_batch=8, written_samples=0) if refit else False
    given = dict.fromkeys("ab", data)
    merged = merge({"a": model, "b": reparametrised}, given, method="identity", refit=settings)
    same = [
        torch.allclose(x, y, atol=1e-3 * float(y.abs().max()))
        for x, y in zip(
            outputs(merged, data, model, task="a").values(), outputs(model, data, model).values(), strict=True
        )
    ]
    assert all(same) if refit else not all(same)


@pytest.mark.parametrize(("width", "experts", "dim"), [(64, 2, 32), (64, 3, 16), (64, 4, 16), (5, 2, 1), (1, 2, None)])
def test_every_experts_head_gets_its_share(width: int, experts: int, dim: int | None):
    assert narrower(width, experts) == dim


WITH_BIASES: dict[str, Callable[[], PreTrainedModel]] = {
    "t5": lambda: T.T5ForConditionalGeneration(T.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                                                          vocab_size=50, decoder_start_token_id=0)),
    "swin": lambda: T.SwinForImageClassification(T.SwinConfig(image_size=16, patch_size=2, embed_dim=16, depths=[2],
                                                              num_heads=[2], window_size=4)),
    "beit": lambda: T.BeitForImageClassification(T.BeitConfig(**tiny.IMAGE, use_relative_position_bias=True)),
    "mpnet": lambda: T.MPNetForSequenceClassification(T.MPNetConfig(**tiny.TEXT)),
}  # fmt: skip
"""Classes with something of its own added to the logits of every head."""


def with_biases(name: str, seed: int = 0) -> PreTrainedModel:
    """A model of such a class, whose biases are of the size of its logits."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = WITH_BIASES[name]().eval()
        for path, table in model.named_parameters():
            if "relative" in path:
                table.data = torch.randn_like(table)
    return model


@pytest.mark.parametrize(
    ("name", "dim"),
    [
        *tiny.mostly_seldom(product(["vit", "clip", "llama", "qwen3"], [2, 4]), 2),
        *((name, 4) for name in WITH_BIASES),
    ],
)
def test_a_split_is_what_the_class_computes_with_narrower_heads(name: str, dim: int):
    """If it multiplies logits by something else, that is found out."""
    model = with_biases(name) if name in WITH_BIASES else case(name).model
    spec = MergeSpec.from_model(model)
    inputs = {n: x[:3] for n, x in calibration(model).items()}
    fields = adapter_for(model).outputs(model)
    program = Program(model, inputs, fields)
    layers = list(find_attention(program, find_sites(program, frozenset(spec.axes), spec.head), spec, {}))
    splits = find_splits(program, layers, model, inputs, fields, layers[0].width // dim, spec)
    assert splits.keys() == set(layers)
    assert {(s.count * s.width, s.width) for s in splits.values()} == {(n.heads * n.width, dim) for n in layers}
    for wrong in (0.5, 1.0):
        others = {layer: replace(split, scale=wrong * split.scale) for layer, split in splits.items()}
        assert is_proven(others, model, inputs, fields) == (wrong == 1.0)


@pytest.mark.parametrize("where", [head_biases, splitting], ids=["exported", "proven"])
def test_layers_that_cannot_be_split_keep_no_others_from_it(where: ModuleType):
    """T5's decoder has a table of its own: its layers stay whole, those of the encoder and the ones between do not."""
    model = with_biases("t5")
    spec = MergeSpec.from_model(model)
    inputs = {n: x[:3] for n, x in calibration(model).items()}
    fields = adapter_for(model).outputs(model)
    program = Program(model, inputs, fields)
    layers = list(find_attention(program, find_sites(program, frozenset(spec.axes), spec.head), spec, {}))

    def failing(model: PreTrainedModel, shapes: dict[str, list[int]], *others: Any) -> PreTrainedModel:
        if any(name.startswith("decoder") for name in shapes):
            raise RuntimeError("the shape is not what it should be")
        return resized_copy(model, shapes, *others)

    with patch.object(where, "resized_copy", failing):
        splits = find_splits(program, layers, model, inputs, fields, 2, spec)
    left = [layer.module for layer in layers if layer not in splits]
    assert len(left) == 2 and all(path.startswith("decoder") and "SelfAttention" in path for path in left)


@pytest.mark.parametrize("model_class", [T.Qwen3ForCausalLM, T.Gemma3ForCausalLM])
def test_norms_of_narrower_heads_have_larger_gains(model_class: type[PreTrainedModel]):
    """Gains that are numbers, and those that are added to one."""
    model = smallest_model(model_class)
    spec, fields = MergeSpec.from_model(model), adapter_for(model).outputs(model)
    inputs = {n: x for n, x in fitted(adapter_for(model).inputs(model), model).items() if isinstance(x, Tensor)}
    program = Program(model, inputs, fields)
    layers = list(find_attention(program, find_sites(program, frozenset(spec.axes), spec.head), spec, {}))
    splits = find_splits(program, layers, model, inputs, fields, 2, spec)
    assert splits.keys() == set(layers)
    others = {layer: replace(split, norm=1.01 * split.norm) for layer, split in splits.items()}
    assert not is_proven(others, model, inputs, fields)


OUTPUTS = ("o_proj", "attn.c_proj", "Attention.o", "attn.o", "attention.dense", "attention.output.dense")
"""What output projections are called."""


def remembering(seen: dict[str, Tensor]) -> Callable[[Fit, RefitSite], dict[str, float]]:
    """`relative_errors` that keeps what output projections read of the first four samples while the walk is there."""

    def remembered(fit: Fit, site: RefitSite) -> dict[str, float]:
        if site.module.endswith(OUTPUTS):
            seen[site.module] = fit.values.of(site.node.args[0], MERGED, 0)[:4]
        return relative_errors(fit, site)

    return remembered


def assert_computes(merged: PreTrainedModel, data: dict[str, Tensor], seen: dict[str, Tensor]) -> None:
    """Output projections of the merged model read what they did in the walk."""
    found: dict[str, Tensor] = {}
    for path in seen:
        merged.trunk.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: found.__setitem__(path, args[0])
        )
    outputs(merged, {key: x[:4] for key, x in data.items()}, merged, task="a")
    for path, value in seen.items():
        torch.testing.assert_close(found[path].reshape(value.shape), value, rtol=1e-3, atol=1e-4)


CHOSEN = {
    "qwen3": "model.layers.0.self_attn",
    "gpt-neox": "gpt_neox.layers.0.attention",
    "deberta-v2": "deberta.encoder.layer.0.attention",
}
"""Classes in which something stands between the maps and the logits; their first attention."""


@pytest.mark.parametrize(
    ("name", "split"),
    tiny.mostly_seldom(
        [
            *((name, True) for name in ("vit", "llama", "qwen3", "gpt-neox", "gpt2", "t5", "mpnet")),
            *((name, False) for name in ("vit", "llama", "t5")),
        ],
        2,
    ),
)
def test_the_merged_model_computes_what_the_walk_did(name: str, split: bool):
    """With more and narrower heads, too, with some of their rotary pairs, or with biases of their own."""
    seen: dict[str, Tensor] = {}
    models = tuple(map(partial(with_biases, name), (0, 1))) if name in WITH_BIASES else tiny.pair(name)
    data = calibration(models[0])
    settings = RefitConfig(split_heads=split, micro_batch=4, written_samples=0, unit_steps=8, answer_steps=8)
    with patch.object(walk, "relative_errors", remembering(seen)):
        merged = merge(dict(zip("ab", models, strict=True)), data, method="identity", refit=settings)
    layers = 6 if name == "t5" else 2
    assert len(seen) == layers
    assert len(merged.config.head_dims) == (layers if split and name not in CHOSEN else 0)
    assert_computes(merged, data, seen)


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("name", ["vit", "dinov2", "llama"])
def test_nothing_is_left_to_gain_at_the_output_projection(name: str, split: bool):
    """It is solved from the moments of the means alone: its own regression finds nothing better.

    Behind a layer scale that is no longer what it was, too, and for heads that share their keys.
    """
    errors = []

    def checked(fit: Fit, site: RefitSite) -> dict[str, float]:
        found = relative_errors(fit, site)
        if site.module.endswith("o_proj"):
            solve_linear(fit, site)
            fit.values.compute(site.node, MERGED)
            errors.extend(zip(found.values(), relative_errors(fit, site).values(), strict=True))
        return found

    models = tiny.pair(name)
    for seed, model in enumerate(models):
        for path, scale in model.named_parameters():
            if path.endswith("lambda1"):
                scale.data = 0.5 + drawn(*scale.shape, seed=seed).float().abs()
    data = {"a": calibration(models[0]), "b": calibration(models[1])}
    settings = RefitConfig(rows_per_input=0, split_heads=split, ridge=1e-6, written_samples=0)
    with patch.object(walk, "relative_errors", checked):
        merge(dict(zip("ab", models, strict=True)), data, method="identity", refit=settings)
    assert len(errors) == 2 * 2
    for before, after in errors:
        assert before > 1e-4 and after == pytest.approx(before, rel=5e-3)


def apart(model: PreTrainedModel, count: int) -> list[PreTrainedModel]:
    """Copies that differ in the first layer's attention alone, whose heads need a quarter of their width."""
    width = model.config.hidden_size // model.config.num_attention_heads
    found = []
    for seed in range(count):
        tensors = dict(model_tensors(model))
        for name in ("q_proj", "k_proj", "v_proj"):
            for leaf in ("weight", "bias"):
                path = f"vit.layers.0.attention.{name}.{leaf}"
                values = drawn(*tensors[path].shape, seed=10 * seed + len(path)).float()
                values.unflatten(0, (-1, width))[:, width // 4 :] = 0
                tensors[path] = values
        found.append(with_tensors(model, tensors))
    return found


@pytest.mark.parametrize(("count", "ridge"), [(2, 1e-9), (3, 1e-9), (4, 1e-9), (2, 0.1)])
def test_heads_that_differ_stay_heads_of_their_own(count: int, ridge: float):
    """Of low rank, so that nothing is lost: what the first layer writes is exactly the experts' mean.

    With a larger ridge, too, for its penalty draws towards the experts' own heads.
    """
    models = apart(case("vit").model, count)
    tasks = "abcd"[:count]
    data = dict.fromkeys(tasks, calibration(models[0]))
    lost = {}
    for split in (True, False):
        settings = RefitConfig(
            own_task_weight=1 / count, ridge=ridge, rows_per_input=0, split_heads=split, stream_bases=False
        )
        experts = dict(zip(tasks, models, strict=True))
        merged = merge(experts, data, method="identity", refit=settings)
        assert ("vit.layers.0.attention" in merged.config.head_dims) == split
        report = RefitReport.of(merged)
        assert report is not None
        lost[split] = max(report.errors["vit.layers.0.attention.o_proj"].values())
    assert lost[True] < 3e-6 < 1e-2 < lost[False]


def test_heads_under_norms_stay_heads_of_their_own(tmp_path: Path):
    """Of experts whose first layers differ, and need half of the rotary pairs and of the values; nothing is lost."""
    model, path = case("qwen3").model, "model.layers.0.self_attn"
    width, pairs, models = 8, [0, 2], []
    for seed in range(2):
        tensors = dict(model_tensors(model))
        for leaf in ("q_proj", "k_proj", "v_proj"):
            name, kept = f"{path}.{leaf}.weight", range(4) if leaf == "v_proj" else pair_units(pairs, width)
            heads = drawn(*tensors[name].shape, seed=10 * seed + len(name)).float().unflatten(0, (-1, width))
            heads[:, [unit for unit in range(width) if unit not in kept]] = 0
            tensors[name] = heads.flatten(0, 1)
        models.append(with_tensors(model, tensors))
    data, lost = calibration(model), {}
    for split in (True, False):
        settings = RefitConfig(
            own_task_weight=0.5, ridge=1e-9, rows_per_input=0, split_heads=split, stream_bases=False, attention_steps=0
        )
        merged = merge(dict(zip("ab", models, strict=True)), data, method="identity", refit=settings)
        assert (merged.config.rotary_pairs.get(path) == pairs) == split
        report = RefitReport.of(merged)
        assert report is not None
        lost[split] = max(report.errors[f"{path}.o_proj"].values())
        if split:
            assert f"{path}.q_norm.weight" not in report.untouched
            merged.save_pretrained(tmp_path)
            again = type(merged).from_pretrained(tmp_path)
            one, other = (outputs(each, data, each, task="a") for each in (merged, again))
            for name, value in one.items():
                torch.testing.assert_close(other[name], value)
    assert lost[True] < 1e-5 < 1e-3 < lost[False]


def half_used(model: PreTrainedModel, path: str, first: int) -> list[PreTrainedModel]:
    """Two experts, each of which uses half of its first layer's heads: the other half than the other one does."""
    models = []
    for seed in range(2):
        tensors = dict(model_tensors(model))
        for leaf in [leaf for leaf in tensors if leaf.startswith(path) and "norm" not in leaf.lower()]:
            tensors[leaf] = 0.5 * drawn(*tensors[leaf].shape, seed=10 * seed + len(leaf)).float()
            if leaf.endswith(tuple(f"{end}.weight" for end in OUTPUTS)):
                tensors[leaf].chunk(2, 1)[abs(first - seed)].zero_()
            if leaf.endswith("dense.bias"):
                tensors[leaf].zero_()
        models.append(with_tensors(model, tensors))
    return models


SHARED_MAPS = tiny.of(
    T.DebertaV2ForSequenceClassification,
    T.DebertaV2Config,
    **tiny.TEXT,
    **tiny.DISENTANGLED,
    share_att_key=True,
    norm_rel_ebd="layer_norm",
    position_buckets=4,
)
"""Words and relative positions by the same maps, as published checkpoints have them."""


@pytest.mark.parametrize(
    ("name", "first"),
    [("qwen3", 0), ("qwen3", 1), ("gpt-neox", 1), ("deberta-v2", 0), ("deberta-v2, shared maps", 1)],
)
def test_heads_that_are_solved_apart_are_chosen(name: str, first: int):
    """Each of two experts uses half of its first layer's heads: those are taken, wherever they are, and nothing is
    lost.
    """
    model = SHARED_MAPS().eval() if "shared" in name else case(name).model
    path, data = CHOSEN[name.partition(",")[0]], calibration(model)
    models, lost = half_used(model, path, first), {}
    for split in (True, False):
        settings = RefitConfig(
            own_task_weight=0.5, ridge=1e-9, rows_per_input=0, split_heads=split, stream_bases=False, attention_steps=0
        )
        merged = merge(dict(zip("ab", models, strict=True)), data, method="identity", refit=settings)
        report = RefitReport.of(merged)
        assert report is not None
        own = [max(e.values()) for n, e in report.errors.items() if n.startswith(path) and n.endswith(OUTPUTS)]
        lost[split] = max(own)
    if "deberta" in name:  # whose stream is normed next, so that experts' values are scaled before their mean is taken
        assert lost[True] < 0.1 * lost[False]
    else:
        assert lost[True] < 1e-5 < 1e-3 < lost[False]


@pytest.mark.parametrize("name", CHOSEN)
def test_heads_that_are_solved_apart_stay_where_they_agree(name: str):
    """Of copies that differ in what comes behind the layer, and of the same heads in another order."""
    model = case(name).model
    with patch.object(attention_solver, "choose_heads", side_effect=AssertionError):
        merge(dict.fromkeys("ab", model), calibration(model), method="permute", refit=True)
    half = half_used(model, CHOSEN[name], 0)[0]
    seen: list[list[int] | None] = []
    choose = attention_solver.choose_heads
    with patch.object(
        attention_solver, "choose_heads", lambda *args: seen.append(choose(*args[:3], 1e-9)) or seen[-1]
    ):
        merge({"a": half, "b": model}, calibration(model), method="identity", refit=True)
    assert seen and set(map(str, seen)) == {"None"}


@pytest.mark.parametrize(("model_class", "gains"), [(T.CohereForCausalLM, False), (T.Olmo2ForCausalLM, True)])
def test_heads_whose_norms_have_a_place_for_each_take_their_gains_along(
    model_class: type[PreTrainedModel], gains: bool
):
    """Or stay where they are, and can be fitted alone; nor can they be narrower."""
    model = smallest_model(model_class)
    if model_class is T.CohereForCausalLM:
        model = model_class(type(model.config).from_dict({**model.config.to_dict(), "use_qk_norm": True})).eval()
    spec = MergeSpec.from_model(model)
    inputs, fields = fitted(adapter_for(model).inputs(model), model), adapter_for(model).outputs(model)
    program = Program(model, inputs, fields)
    layers = list(find_attention(program, find_sites(program, frozenset(spec.axes), spec.head), spec, {}))
    assert layers and all(layer.logits is None and layer.apart.placed for layer in layers)
    assert all((layer.apart.gains is not None) == layer.apart.exchanged == gains for layer in layers)
    assert find_splits(program, layers, model, inputs, fields, 2, spec) == {}


@pytest.mark.parametrize("name", CHOSEN)
def test_heads_that_are_solved_apart_are_written_as_they_were_fitted(name: str):
    """Whatever the steps find, the merged model computes what the walk went on with."""
    models = tiny.pair(name)
    seen: dict[str, Tensor] = {}
    steps = []

    def some(fit: Fit, layer: attention_refinement.WhiteHeads, *args: object, **more: object) -> tuple:
        found = layer.weights()
        steps.append(replace(found, blocks=[(1.5 * query, *others) for query, *others in found.blocks]))
        return steps[-1], torch.zeros(())

    data = {key: torch.cat([x] * (700 // len(x)))[:700] for key, x in calibration(models[0]).items()}
    settings = RefitConfig(attention_steps=16, unit_steps=0, answer_steps=0, micro_batch=16)
    with (
        patch.object(walk, "relative_errors", remembering(seen)),
        patch.object(attention_refinement, "take_steps", some),
    ):
        merged = merge(dict(zip("ab", models, strict=True)), data, method="identity", refit=settings)
    assert len(steps) == 2
    assert_computes(merged, data, seen)


def test_some_whole_heads_may_be_nearer_than_all_narrower_ones():
    """The narrower ones, which were nearer than paired ones, have no part in them."""
    models, seen = tiny.pair("qwen3"), dict[str, Tensor]()
    data = calibration(models[0])
    groups = models[0].config.num_key_value_heads
    with (
        patch.object(walk, "relative_errors", remembering(seen)),
        patch.object(attention_solver, "WORTH", float("inf")),
        patch.object(attention_solver, "choose_heads", return_value=list(range(1, groups + 1))) as choose,
    ):
        merged = merge(dict(zip("ab", models, strict=True)), data, method="identity", refit={"written_samples": 0})
    assert choose.call_count == len(seen) == 2 and merged.config.head_dims == {}
    assert_computes(merged, data, seen)


@pytest.mark.parametrize("equal", [True, False])
def test_biases_have_a_say_in_whether_heads_are_split(equal: bool):
    """Of experts whose queries and keys are the same: where their tables are, too, heads are paired."""
    model = with_biases("beit")
    tables = {path: table for path, table in model_tensors(model).items() if "bias_table" in path}
    other = with_tensors(model, {**model_tensors(model), **({} if equal else {p: -t for p, t in tables.items()})})
    merged = merge({"a": model, "b": other}, calibration(model), method="identity", refit=True)
    assert (merged.config.head_dims == {}) == equal


def test_no_groups_of_inputs_leave_less_of_independent_targets():
    """Where groups do not overlap, the greedy choice is the best there is."""
    basis = torch.linalg.qr(drawn(12, 12)).Q
    weights = drawn(12, 5, seed=3) * torch.arange(1, 13)[:, None]
    gram = torch.block_diag(*(moment(3, seed) + torch.eye(3) for seed in range(4)))
    cross = gram @ (basis @ weights)
    found = best_groups(gram, cross, 3, 2)
    units = {pair: torch.cat([torch.arange(3 * g, 3 * g + 3) for g in pair]) for pair in combinations(range(4), 2)}
    left = {pair: left_over(gram, cross, torch.tensor(1e6), own) for pair, own in units.items()}
    assert tuple(found) == min(left, key=left.__getitem__)


@pytest.mark.parametrize("narrow", [True, False])
def test_heads_that_agree_are_not_split(narrow: bool):
    """Not even where half of the width would do."""
    model = apart(case("vit").model, 1)[0] if narrow else case("vit").model
    merged = merge(dict.fromkeys("ab", model), calibration(model), method="permute", refit=True)
    assert merged.config.head_dims == {}


def test_heads_that_nearly_agree_are_paired():
    """Copies of one base whose heads need all of their width: half of it would lose more than their mean does."""
    base = case("vit").model
    models = []
    for seed in (1, 2):
        tensors = dict(model_tensors(base))
        for name in [name for name in tensors if "q_proj" in name or "k_proj" in name]:
            noise = drawn(*tensors[name].shape, seed=seed + len(name)).float()
            tensors[name] = tensors[name] + 0.1 * tensors[name].std() * noise
        models.append(with_tensors(base, tensors))
    merged = merge(dict(zip("ab", models, strict=True)), calibration(base), method="identity", refit=True)
    assert merged.config.head_dims == {}


def test_a_class_whose_heads_cannot_be_cut_keeps_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(head_dims, "HEAD_DIMS", ())
    models = dict(zip("ab", tiny.pair("vit"), strict=True))
    merged = merge(models, calibration(models["a"]), method="identity", refit=True)
    assert merged.config.head_dims == {}


@pytest.mark.parametrize("fixed", [True, False])
def test_heads_that_each_have_a_mask_keep_their_number(fixed: bool, monkeypatch: pytest.MonkeyPatch):
    """If it is made for so many and no other."""
    plain = ViTAttention.forward

    def masked(self: ViTAttention, hidden_states: Tensor, attention_mask: None = None, **more: object) -> object:
        samples, tokens, _ = hidden_states.shape
        mask = torch.zeros(samples, 1, tokens, tokens).expand(-1, 4 if fixed else self.num_attention_heads, -1, -1)
        return plain(self, hidden_states, mask, **more)

    monkeypatch.setattr(ViTAttention, "forward", masked)
    models = dict(zip("ab", tiny.pair("vit"), strict=True))
    merged = merge(models, calibration(models["a"]), method="identity", refit=True)
    assert (merged.config.head_dims == {}) == fixed


@pytest.mark.parametrize("name", ["t5", "swin"])
def test_layers_that_share_a_table_are_split_together(name: str, tmp_path: Path):
    """Every expert's heads keep their own column; copies, whose heads agree, keep the table as it is."""
    models = [with_biases(name, seed) for seed in (0, 1)]
    data = calibration(models[0])
    merged = merge(dict(zip("ab", models, strict=True)), data, method="identity", refit=True)
    tables = {
        path: table
        for path, table in model_tensors(merged.trunk).items()
        if "bias_table" in path or "n_bias.w" in path
    }
    assert tables and merged.config.trunk_shapes.keys() == tables.keys()
    for path, table in tables.items():
        torch.testing.assert_close(table, torch.cat([model_tensors(model)[path] for model in models], -1))
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path)
    for one, other in zip(*(outputs(m, data, models[0], task="a").values() for m in (merged, again)), strict=True):
        assert torch.equal(one, other)
    same = merge(dict.fromkeys("ab", models[0]), data, method="identity", refit=True)
    assert same.config.head_dims == same.config.trunk_shapes == {}


def test_a_class_that_leaves_the_scale_to_the_op_is_refitted_like_others():
    found = {}
    for kept in (True, False):
        models = apart(case("vit").model, 2)
        for module in (m for model in models for m in model.modules() if isinstance(m, ViTAttention) and not kept):
            module.scaling = None
        experts = dict(zip("ab", models, strict=True))
        found[kept] = merge(experts, calibration(models[0]), method="identity", refit=True)
    assert found[True].config.head_dims == found[False].config.head_dims != {}
    inputs = calibration(models[0])
    expected, logits = (found[kept](**inputs, task="a").logits for kept in (True, False))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_experts_with_eager_attention_are_refitted_like_others():
    models = tiny.pair("vit")
    found = {}
    for implementation in ("eager", "sdpa"):
        for model in models:
            model.set_attn_implementation(implementation)
        experts = dict(zip("ab", models, strict=True))
        found[implementation] = merge(experts, calibration(models[0]), method="identity", refit=True)
    assert found["eager"].config.head_dims == found["sdpa"].config.head_dims != {}
    inputs = calibration(models[0])
    expected, logits = (found[name](**inputs, task="a").logits for name in ("sdpa", "eager"))
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
