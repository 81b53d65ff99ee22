"""What the refit solves of classes that are made of other things than linear maps and norms."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as T
from torch import Tensor, nn

from benchmarks.coverage import in_general_position, samples
from benchmarks.smallest import smallest_model
from hf_zipit import merge
from hf_zipit.adapters import adapter_for
from hf_zipit.refit import RefitReport, walk
from hf_zipit.refit.mixtures import find_mixtures
from hf_zipit.refit.mlps import find_mlps
from hf_zipit.refit.program import Program
from hf_zipit.refit.regression import GroupedGram, ridge
from hf_zipit.refit.rewrites import routed_linear
from hf_zipit.refit.shared import _Sums
from hf_zipit.refit.solvable import find_shared, find_sites, part_of
from hf_zipit.symmetry.ops import op_name
from hf_zipit.symmetry.proof import model_tensors
from hf_zipit.symmetry.spec import Factor, MergeSpec, Space, Sum, Symmetry, fitted

from .. import tiny
from ..test_invariants import assert_same, calibration, case, experts, outputs

KEPT = {"logit_scale", "logit_bias", "q_norm", "k_norm", "inv_freq"}
"""Words in the names of what is kept: numbers for all units, norms of each head before a rotation, frequencies."""


def program_of(model: nn.Module, inputs: dict[str, Tensor]) -> Program:
    return Program(model, fitted(inputs, model), adapter_for(model).outputs(model))


@pytest.mark.parametrize("name", ["albert", "convnext", "siglip-vision", "wav2vec2", "mixtral"])
def test_a_class_of_other_layers_is_solved_and_a_reordered_copy_comes_back(name: str):
    """Shared layers, depthwise and one-dimensional convolutions, weight norms, pooling heads, mixtures, gains."""
    it = case(name)
    named, refit = {"a": it.model, "b": it.moved}, {"micro_batch": 8}
    result = merge(named, it.inputs, method="permute", refit=refit, corrections=())
    for task, model in named.items():
        assert_same(outputs(result, it.inputs, model, task=task), outputs(model, it.inputs, model), 1e-3)
    report = RefitReport.of(result)
    assert not [name for name in report.untouched if not any(word in name for word in KEPT)]
    assert max(e for by_task in report.errors.values() for e in by_task.values()) < 1e-5


@pytest.mark.parametrize(
    ("name", "solved"),
    [
        ("ApertusModel", "layers.1.mlp.up_proj.weight"),  # its units' nonlinearity has parameters
        ("Cohere2MoeModel", "layers.1.mlp.experts.gate_up_proj"),  # nothing but the experts reads their inputs
        ("XLNetModel", "layer.1.ff.layer_1.weight"),  # its biases have an axis of heads and one of their units
    ],
)
def test_classes_of_unusual_parts_are_solved_but_for_these(name: str, solved: str):
    random = {task: in_general_position(name, seed) for seed, task in enumerate("ab")}
    steps = {"attention_steps": 0, "unit_steps": 0, "answer_steps": 0}
    report = RefitReport.of(merge(random, samples(random["a"]), method="permute", refit=steps, corrections={}))
    assert solved in dict(random["a"].named_parameters()).keys() - report.untouched


def test_the_biases_of_a_mixtures_experts_are_no_table_that_is_solved():
    torch.manual_seed(0)
    sizes = {**tiny.DECODER, "num_hidden_layers": 1, "intermediate_size": 16, "head_dim": 8, "pad_token_id": 0}
    model = T.GptOssForCausalLM(T.GptOssConfig(**sizes, num_local_experts=4, num_experts_per_tok=2)).eval()
    inputs = calibration(model)
    twins = {"a": model, "b": copy.deepcopy(model)}
    result = merge(twins, inputs, method="permute", refit={"micro_batch": 8}, corrections=())
    assert_same(outputs(result, inputs, model, task="b"), outputs(model, inputs, model), 1e-3)


def test_a_mixture_of_models_that_differ_is_fitted_better_than_by_combining():
    """Measured at the outputs: the mean error on all samples, as a share of the spread of the answers."""
    named = dict(zip("ab", experts("mixtral"), strict=True))
    inputs = calibration(named["a"])

    def error(refit: object) -> float:
        result = merge(named, inputs, method="permute", refit=refit, corrections=())
        off = spread = 0.0
        for task, model in named.items():
            found, expected = (
                outputs(one, inputs, model, **kw)["logits"] for one, kw in ((result, {"task": task}), (model, {}))
            )
            off += float((found - expected).square().sum())
            spread += float((expected - expected.mean(0)).square().sum())
        return off / spread

    assert error({"micro_batch": 8, "rows_per_input": 0}) < 0.12 * error(False)


def test_t5_has_one_table_for_its_words_and_its_head():
    model = smallest_model(T.T5ForConditionalGeneration)
    inputs = adapter_for(model).inputs(model)
    program = Program(model, inputs, adapter_for(model).outputs(model), frozenset({"shared.weight"}))
    (places,) = find_shared(program, frozenset({"shared.weight"}))
    assert [site.kind for site in places] == ["embedding", "embedding", "linear"]


def test_the_last_linear_map_and_the_words_may_be_one_table():
    """It solves both kinds' normal equations together, each error as a share of its targets' energy."""
    generator = torch.Generator().manual_seed(0)
    rows, d, n = 5, 3, 40
    indices = torch.randint(rows, (n,), generator=generator)
    wanted, x, logits = (torch.randn(n, size, generator=generator).double() for size in (d, d, rows))

    class Settings:
        config = type("Config", (), {"ridge": 0.0})
        all_reduce = staticmethod(lambda x: x)

    sums = _Sums.__new__(_Sums)
    sums.fit, sums.prior = Settings(), torch.randn(rows, d, generator=generator)  # type: ignore[assignment]
    gram = walk.Fit.gram(type("Home", (), {"home": torch.device("cpu")})(), sums.prior)
    gram.add(x.float(), logits.float(), torch.ones(n))
    total = torch.zeros(rows, d, dtype=torch.float64).index_add_(0, indices, wanted)
    sums.rows, sums.maps = (total, indices.bincount(minlength=rows).double()), (None, gram)  # type: ignore[assignment]
    sums.energies = torch.stack([wanted.square().sum(), logits.square().sum()])

    def error(table: Tensor) -> Tensor:
        looked_up = (table[indices] - wanted).square().sum() / sums.energies[0]
        return looked_up + (x @ table.T - logits).square().sum() / sums.energies[1]

    found = sums._tied().requires_grad_()
    (slope,) = torch.autograd.grad(error(found), found)
    assert slope.abs().max() < 1e-5


def test_groups_are_regressions_of_their_own():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, 4, generator=generator)
    slope = torch.randn(3, 2, 4, generator=generator)
    gram = GroupedGram(torch.randn(3, 2, 4, generator=generator), torch.device("cpu"))
    gram.add(x, torch.einsum("rgd,gkd->rgk", x, slope) + 1.5, torch.rand(50, generator=generator))
    for moments, own in zip(gram.reduce(), slope, strict=True):
        found, shift = ridge(moments, own * 0, 1e-12)
        torch.testing.assert_close(found, own.double(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(shift, torch.full((2,), 1.5, dtype=torch.float64), rtol=1e-5, atol=1e-5)


def test_which_part_of_an_axis_some_units_are():
    """Of heads x (queries + keys), as in one fused projection, and of queries + keys."""
    spaces = {name: Space(name, size, Symmetry.PERMUTATION) for name, size in (("h", 2), ("q", 3), ("k", 2))}
    spec = MergeSpec("", spaces, {})
    h, q, k = ((Factor(name),) for name in "hqk")
    fused = (*h, Sum((q, k)))
    assert part_of(fused, [0, 1, 2, 5, 6, 7], spec) == (*h, *q)
    assert part_of(fused, [3, 4, 8, 9], spec) == (*h, *k)
    assert part_of(fused, range(10), spec) == fused
    assert part_of(fused, [0, 1, 2, 3], spec) is None
    assert part_of((Sum((q, k)),), [3, 4], spec) == k
    assert part_of((Sum((q, k, q)),), [3, 4, 5, 6, 7], spec) == (Sum((k, q)),)
    assert part_of(h, [1], spec) is None


class StepByStep(nn.Module):
    """Attention as classes write it, and a linear map as some do."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.maps, self.out, self.kind = nn.Linear(8, 24), nn.Parameter(torch.randn(8, 8)), kind

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in self.maps(x).chunk(3, -1))
        if self.kind == "beside samples":
            query, key, value = (y.reshape(-1, 5, 4) for y in (query, key, value))
            slopes = torch.tensor([0.5, 0.25, 0.5, 0.25])[:, None, None] * torch.arange(5)
            logits = torch.baddbmm(slopes, query, key.transpose(-1, -2), beta=1.0, alpha=0.7).view(2, 2, 5, -1)
            means = torch.bmm(torch.softmax(logits + x[:, None, :, :1].mT, -1).view(4, 5, -1), value).view(2, 2, 5, 4)
            return means.transpose(1, 2).flatten(2) @ self.out.T
        logits = query @ (key / 2).transpose(-1, -2) * 3
        if self.kind == "biases":
            logits = logits + x[:, None, :, :1] + x[:, None, :, 1:2].mT
        means = torch.softmax(logits, -1) @ value
        return means.transpose(1, 2).flatten(2) @ self.out.T


class ByNumber(nn.Module):
    """Parts of an axis by their numbers, some of which lie side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.maps(x).unflatten(-1, (6, 4))
        copy = heads[..., [1, 2], :]
        copy += 1  # the heads stay what they are
        return torch.cat(
            [copy, heads[..., [-2], :], heads[..., [1, 2], :], heads[..., [-2, -1], :], heads[..., [3, 1], :]], 2
        )


def test_parts_by_numbers_side_by_side_are_slices():
    model, x = ByNumber(), torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    program = Program(model, {"x": x}, None)
    names = [op_name(node) for node in program.nodes]
    assert (names.count("slice"), names.count("index")) == (3, 2)
    values: dict = {}
    with torch.no_grad():
        for node in program.nodes:
            values[node] = program.run(node, values.__getitem__, model_tensors(model), {"x": x})
        torch.testing.assert_close(values[program.outputs["output"]], model(x))


@pytest.mark.parametrize("kind", ["", "biases", "beside samples"])
def test_attention_step_by_step_is_one_op_that_computes_the_same(kind: str):
    model = StepByStep(kind)
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    program = Program(model, {"x": x}, None)
    names = [op_name(node) for node in program.nodes]
    assert "scaled_dot_product_attention" in names and {"softmax", "matmul", "bmm", "baddbmm"}.isdisjoint(names)
    weights = frozenset({"maps.weight", "out"})
    assert weights == {site.weight for site in find_sites(program, weights).values()}
    values: dict = {}
    with torch.no_grad():
        for node in program.nodes:
            values[node] = program.run(node, values.__getitem__, model_tensors(model), {"x": x})
        torch.testing.assert_close(values[program.outputs["output"]], model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "count"), [("phi3", 2), ("llama", 2), ("gpt-neox", 2)])
def test_whose_units_can_be_chosen(name: str, count: int):
    """Those of fused gates as well."""
    model = tiny.build(name)
    spec = MergeSpec.from_model(model)
    program = program_of(model, adapter_for(model).inputs(model))
    assert len(list(find_mlps(program, find_sites(program, frozenset(spec.axes), spec.head), spec))) == count


def test_the_last_of_parallel_branches_aims_at_the_stream():
    """GPT-NeoX adds what attention and the MLP put out, and then both to the stream."""
    model = tiny.build("gpt-neox")
    spec = MergeSpec.from_model(model)
    program = program_of(model, adapter_for(model).inputs(model))
    sites = find_sites(program, frozenset(spec.axes), spec.head).values()
    last = [site for site in sites if site.weight.endswith("dense_4h_to_h.weight")]
    assert len(last) == 2 and all(len(site.more) == 1 for site in last)


def test_a_mixtures_experts_are_solved_on_the_tokens_that_they_get():
    model = tiny.build("mixtral")
    spec = MergeSpec.from_model(model)
    program = program_of(model, adapter_for(model).inputs(model))
    sites = find_sites(program, frozenset(spec.axes), spec.head)
    found = list(find_mixtures(program, sites))
    assert len(found) == 2 and all(mixture.stream is not None and mixture.repeated == 2 for mixture in found)
    weight, x = torch.randn(3, 2, 4), torch.randn(6, 4)
    chosen = torch.tensor([2, 0, 2, 1, 1, 0])
    expected = torch.stack([weight[number] @ row for number, row in zip(chosen, x, strict=True)])
    torch.testing.assert_close(routed_linear(x, weight, chosen), expected)


def test_the_walk_goes_on_with_what_weights_are_made_into():
    """A weight norm's product, or a gain and one: it was made with the combined weights, before they were solved."""
    named = dict(zip("ab", experts("wav2vec2"), strict=True))
    result = merge(named, calibration(named["a"]), method="permute", refit={"micro_batch": 8}, corrections=())
    errors = RefitReport.of(result).errors["wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight"]
    assert max(errors.values()) < 1
