"""Maps whose outputs are normed before they reach the stream, and heads that can be fitted but not moved."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
import transformers as T
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_zipit import merge
from hf_zipit.adapters import adapter_for
from hf_zipit.refit import RefitReport, attention_refinement, attention_solver, walk
from hf_zipit.refit.attention import SolvedApart, find_attention
from hf_zipit.refit.chosen_heads import ExpertHeads
from hf_zipit.refit.fit import Fit, relative_errors
from hf_zipit.refit.normed_writers import with_branch_norms
from hf_zipit.refit.program import Program
from hf_zipit.refit.solvable import RefitSite, find_sites
from hf_zipit.refit.values import MERGED
from hf_zipit.symmetry.proof import apply_element, model_tensors, random_element
from hf_zipit.symmetry.spec import MergeSpec, fitted

from .. import tiny
from ..second_device import accelerator_on_second, second_device
from ..test_invariants import assert_same, in_general_position, outputs, with_tensors

BUILDERS = {
    "gemma2": tiny.of(T.Gemma2ForCausalLM, T.Gemma2Config, **tiny.DECODER, head_dim=8, sliding_window=4),
    "gemma3": tiny.of(T.Gemma3ForCausalLM, T.Gemma3TextConfig, **tiny.DECODER, head_dim=8, sliding_window=4),
    "olmo2": tiny.of(T.Olmo2ForCausalLM, T.Olmo2Config, **tiny.DECODER),
    "glm4": tiny.of(T.Glm4ForCausalLM, T.Glm4Config, **tiny.DECODER, head_dim=8, pad_token_id=0),
    "llama": tiny.EVERYTHING["llama"],
}


def experts(name: str, count: int = 2) -> list[PreTrainedModel]:
    draw = torch.Generator().manual_seed(2)
    return [in_general_position(BUILDERS[name](), draw) for _ in range(count)]


def texts() -> Tensor:
    return torch.randint(3, 49, (96, 7), generator=torch.Generator().manual_seed(0))


def by_task() -> dict[str, dict[str, Tensor]]:
    return {task: {"input_ids": part} for task, part in zip("ab", texts().chunk(2), strict=True)}


def traced(model: nn.Module) -> tuple[Program, MergeSpec]:
    adapter = adapter_for(model)
    return Program(model, fitted(adapter.inputs(model), model), adapter.outputs(model)), MergeSpec.from_model(model)


@pytest.mark.parametrize(("name", "each"), [("gemma2", 2), ("gemma3", 2), ("olmo2", 2), ("glm4", 2), ("llama", 0)])
def test_output_projections_know_the_norm_behind_them(name: str, each: int):
    model = BUILDERS[name]()
    program, spec = traced(model)
    found = with_branch_norms(program, find_sites(program, frozenset(spec.axes), spec.head))
    behind = [site for site in found.values() if site.behind is not None]
    assert len(behind) == each * model.config.num_hidden_layers
    assert all(site.aim.stream is not None and "post" in site.aim.weight for site in behind)


def test_no_op_meets_tensors_of_two_devices():
    few = {"attention_steps": 2, "unit_steps": 2, "answer_steps": 0, "written_samples": 0}
    with patch.object(attention_refinement, "EVERY", 2), second_device():
        models = dict(zip("ab", experts("gemma2"), strict=True))
        merge(models, by_task(), accelerator=accelerator_on_second(), method="permute", refit=few)


class Branch(nn.Module):
    """A branch with a gain behind ops that norms are made of."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.map, self.gain = kind, nn.Linear(8, 8), nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = x.tanh()
        y = self.map(x)
        if self.kind == "square":
            y = y.pow(2)
        root = torch.rsqrt(y.pow(2).mean(1 if self.kind == "positions" else -1, keepdim=True) + 1e-6)
        y = y * (y.mean(-1, keepdim=True) if self.kind == "length" else root)
        if self.kind == "late":
            x = x * 1.5
        return {"y": x + self.gain * (y * -1 if self.kind == "minus" else y)}


@pytest.mark.parametrize("kind", ["norm", "square", "positions", "length", "late", "minus"])
def test_what_a_norm_is_and_what_is_not(kind: str):
    """It keeps directions and no length, row by row; and what it is added to has to be known before the map runs."""
    program = Program(Branch(kind), {"x": torch.randn(2, 3, 8)}, None)
    sites = with_branch_norms(program, find_sites(program, frozenset({"map.weight", "map.bias", "gain"})))
    found = [site.weight for site in sites.values() if site.behind is not None]
    assert found == (["map.weight"] if kind == "norm" else [])


@pytest.mark.parametrize("name", ["gemma3", "olmo2"])
@pytest.mark.parametrize("gain", [None, 0.0])
def test_a_fresh_model_merged_with_itself_stays_itself(name: str, gain: float | None):
    """Its branches put out so little that the norms' epsilon counts; and where a gain is zero, nothing is known."""
    torch.manual_seed(0)
    model, inputs = BUILDERS[name](), {"input_ids": texts()}
    if gain is not None:
        for path, own in model.named_parameters():
            if "post" in path:
                own.data[3] = gain - ("gemma" in name)  # which adds one
    merged = merge({"a": model, "b": model}, inputs, method="permute", refit={"written_samples": 0})
    assert_same(outputs(merged, inputs, model, task="a"), outputs(model, inputs, model), 1e-4)


@pytest.mark.parametrize("name", ["gemma3", "olmo2"])
def test_a_merge_is_nearer_to_its_experts_where_norms_are_known(name: str):
    models, data, off = dict(zip("ab", experts(name), strict=True)), by_task(), []
    for known in (True, False):
        with patch.object(walk, "with_branch_norms", with_branch_norms if known else lambda _, sites: sites):
            merged = merge(models, data, method="permute", refit={"written_samples": 0, "answer_steps": 0})
        with torch.no_grad():
            pairs = [(merged(**data[t], task=t).logits, models[t](**data[t]).logits) for t in models]
        off.append(sum(float((one - other).square().mean() / other.var()) for one, other in pairs))
    assert off[0] < 0.9 * off[1]


@pytest.mark.parametrize("name", ["gemma2", "olmo2"])
def test_a_reordered_copy_comes_back(name: str):
    (model,), inputs = experts(name, 1), {"input_ids": texts()}
    spec = MergeSpec.from_model(model)
    element = random_element(spec, torch.Generator().manual_seed(1), True)
    moved = with_tensors(model, apply_element(model_tensors(model), spec, element))
    merged = merge({"a": model, "b": moved}, inputs, method="permute", refit={"written_samples": 0})
    for task, own in (("a", model), ("b", moved)):
        assert_same(outputs(merged, inputs, own, task=task), outputs(own, inputs, own), 1e-3)


def test_heads_under_one_norm_are_as_long_as_under_their_experts():
    """Whichever of them are taken: of the four that two experts have, one of each."""
    models, seen = dict(zip("ab", experts("olmo2"), strict=True)), list[tuple[Tensor, Tensor]]()
    solver = attention_solver.AttentionSolver
    choose = solver._choose

    def chosen(self: attention_solver.AttentionSolver, apart: SolvedApart, heads: ExpertHeads, _: object) -> object:
        found = choose(self, apart, heads, [0, 3])
        gains = {name: self.fit.values.merged[name] for name in apart.scales}
        lengths = self._lengths(heads.blocks, heads.scales), self._lengths(self.blocks, [gains])
        seen.extend(zip(*lengths, strict=True))
        return found

    with patch.object(attention_solver, "choose_heads", return_value=[0, 3]), patch.object(solver, "_choose", chosen):
        merge(models, by_task(), method="permute", refit={"written_samples": 0, "answer_steps": 0})
    assert len(seen) == 4  # queries and keys of two layers
    for every, own in seen:
        torch.testing.assert_close(own, every.unflatten(0, (4, -1))[[0, 3]].flatten(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["gemma2", "olmo2"])
def test_heads_that_cannot_be_moved_are_fitted(name: str):
    """And what norms behind branches make, as the walk knows it, is what the merged model computes."""
    models, data, seen = dict(zip("ab", experts(name), strict=True)), by_task(), dict[str, Tensor]()
    program, spec = traced(models["a"])
    layers = list(find_attention(program, find_sites(program, frozenset(spec.axes), spec.head), spec, {}))
    assert len(layers) == 2 and all(layer.apart is not None for layer in layers)

    def remembered(fit: Fit, site: RefitSite) -> dict[str, float]:
        seen[site.module] = fit.values.of(site.output, MERGED, 0)[:4]
        return relative_errors(fit, site)

    passes = patch.object(attention_refinement, "PASSES", 16)  # of the few samples that there are
    none_are_chosen = patch.object(attention_solver, "choose_heads", return_value=None)
    steps = patch.object(attention_refinement, "take_steps", wraps=attention_refinement.take_steps)
    with passes, none_are_chosen, steps as taken, patch.object(walk, "relative_errors", remembered):
        merged = merge(models, data, method="permute", refit={"written_samples": 0, "answer_steps": 0})
    assert taken.call_count == len(layers)
    assert {path.rpartition(".")[2] for path in RefitReport.of(merged).errors}.isdisjoint({"o_proj", "down_proj"})
    computed: dict[str, Tensor] = {}
    for path in (path for path in seen if "post" in path):
        merged.trunk.get_submodule(path).register_forward_hook(
            lambda _, __, found, path=path: computed.__setitem__(path, found)
        )
    with torch.no_grad():
        merged(input_ids=data["a"]["input_ids"][:4], task="a")
    assert len(computed) == 4
    for path, value in computed.items():
        torch.testing.assert_close(value, seen[path], rtol=1e-3, atol=1e-4)
