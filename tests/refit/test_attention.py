"""Attention in the refit: which layers are solved as a whole, and that heads are compared by what they compute."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_zipit import merge
from hf_zipit.adapters import adapter_for
from hf_zipit.refit import RefitConfig
from hf_zipit.refit.attention import find_attention, logit_factors, value_factors
from hf_zipit.refit.graph import Program, find_sites
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


def lost(product: Tensor, query: Tensor, key: Tensor, left: Tensor, right: Tensor) -> float:
    """The mean square error of the logits over independent pairs of inputs with the given moments."""
    off = product - query.mT @ key
    return float(torch.trace(off.mT @ left @ off @ right))


def test_experts_with_the_same_logits_keep_them():
    """Whatever basis each expert has inside its head."""
    query, key = drawn(HEAD_DIM, 9, seed=2), drawn(HEAD_DIM, 7, seed=3)
    basis = drawn(HEAD_DIM, HEAD_DIM, seed=4)
    other = basis @ query, torch.linalg.inv(basis).mT @ key
    found = logit_factors([query, other[0]], [key, other[1]], moment(9), moment(7), HEAD_DIM)
    torch.testing.assert_close(found[0].mT @ found[1], query.mT @ key)


def test_no_other_factors_of_the_rank_lose_less():
    queries, keys = [drawn(HEAD_DIM, 9, seed=s) for s in (2, 3)], [drawn(HEAD_DIM, 7, seed=s) for s in (4, 5)]
    left, right = moment(9), moment(7)
    product = (queries[0].mT @ keys[0] + queries[1].mT @ keys[1]) / 2
    query, key = logit_factors(queries, keys, left, right, HEAD_DIM)
    least = lost(product, query, key, left, right)
    assert least > 0
    for seed in range(20):
        other = query + 0.05 * drawn(*query.shape, seed=seed), key + 0.05 * drawn(*key.shape, seed=seed + 99)
        assert lost(product, *other, left, right) > least
    # Twice the rank is enough for two experts.
    wide = logit_factors(queries, keys, left, right, 2 * HEAD_DIM)
    torch.testing.assert_close(wide[0].mT @ wide[1], product)


def test_values_of_full_rank_are_the_solution_and_of_less_the_nearest():
    slope, covariance = drawn(6, 8, seed=2), moment(8)
    out, mix = value_factors(slope, covariance, 8)
    torch.testing.assert_close(out @ mix, slope)
    out, mix = value_factors(slope, covariance, HEAD_DIM)
    off = slope - out @ mix
    least = float(torch.trace(off @ covariance @ off.mT))
    singular = torch.linalg.svdvals(slope @ torch.linalg.cholesky(covariance))
    assert least == pytest.approx(float(singular[HEAD_DIM:].square().sum()))


@pytest.mark.parametrize(
    ("name", "layers"),
    [("vit", 2), ("clip", 4), ("bert-masked", 2), ("distilbert-masked", 2), ("roberta-prelayernorm", 2)]
    + [("segformer", 6), ("llama", 0), ("qwen3", 0), ("gpt2", 0), ("resnet-basic", 0)],
)
def test_which_layers_are_solved_as_a_whole(name: str, layers: int):
    model = tiny.build(name)
    spec = MergeSpec.from_model(model)
    program = Program(model, fitted(adapter_for(model).inputs(model), model), adapter_for(model).outputs(model))
    found = list(find_attention(program, find_sites(program, frozenset(spec.axes), spec.head), spec))
    assert len(found) == layers
    for layer in found:
        assert len({layer.query.weight, layer.key.weight, layer.value.weight, layer.output.weight}) == 4


@pytest.mark.parametrize("name", ["vit", "clip-vision", "bert-sequence", "distilbert-sequence"])
@pytest.mark.parametrize("refit", [False, True])
def test_a_change_of_basis_inside_heads_is_seen_through(name: str, refit: bool):
    """Without alignment: what is inside the heads does not fit at all, and its mean is another model."""
    model = case(name).model
    spec = MergeSpec.from_model(model)
    element = random_element(spec, torch.Generator().manual_seed(3))
    inside = {n: g for n, g in element.items() if spec.spaces[n].symmetry is Symmetry.LINEAR}
    turned = with_tensors(model, apply_element(model_tensors(model), spec, inside))
    data = calibration(model)
    settings = RefitConfig(ridge=1e-2, micro_batch=8) if refit else False
    given = dict.fromkeys("ab", data)
    merged = merge({"a": model, "b": turned}, given, method="identity", refit=settings, progress=False)
    same = [
        torch.allclose(x, y, atol=1e-3 * float(y.abs().max()))
        for x, y in zip(
            outputs(merged, data, model, task="a").values(), outputs(model, data, model).values(), strict=True
        )
    ]
    assert all(same) if refit else not all(same)
