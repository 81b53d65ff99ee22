"""Layers that run again and again, fitted through all rounds."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from hf_zipit import merge
from hf_zipit.adapters import adapter_for
from hf_zipit.refit import RefitReport, steps, walk
from hf_zipit.refit.fit import Fit, relative_errors
from hf_zipit.refit.program import Program
from hf_zipit.refit.shared_refinement import recurring, rounds_of
from hf_zipit.refit.solvable import RefitSite, find_shared, find_sites
from hf_zipit.refit.values import MERGED
from hf_zipit.symmetry.ops import op_name
from hf_zipit.symmetry.spec import MergeSpec, fitted

from .. import tiny
from ..test_invariants import case, experts


class Rounds(nn.Module):
    """A layer that runs twice: `again` and again, `beside` each other, or with another layer `between` its rounds."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.norm = kind, nn.LayerNorm(8)
        self.inner, self.outer, self.alone, self.head = (nn.Linear(8, 8) for _ in range(4))

    def layer(self, x: Tensor) -> Tensor:
        return x + self.outer(torch.relu(self.inner(self.norm(x))))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        first = self.layer(x)
        if self.kind == "between":
            first = first + self.alone(first)
        second = self.layer(x.flip(1) if self.kind == "beside" else first)
        return torch.cat([self.head(first), self.head(second)], 1)


@pytest.mark.parametrize("kind", ["again", "beside", "between"])
def test_which_layers_run_again(kind: str):
    """A head that is used several times, too, is none of them."""
    model = Rounds(kind)
    program = Program(model, {"x": torch.randn(2, 5, 8)}, None)
    trunk = frozenset(dict(model.named_parameters()))
    groups = find_shared(program, trunk)
    assert {places[0].module for places in groups} == {"norm", "inner", "outer", "head"}
    found = recurring(program, groups, find_sites(program, trunk).values())
    assert {places[0].module for places in found} == ({"norm", "inner", "outer"} if kind == "again" else set())


def test_rounds_are_nearer_to_the_experts_where_they_are_fitted_together():
    """And what the walk goes on with is what the merged model computes."""
    models, left, seen = dict(zip("ab", tiny.pair("albert"), strict=True)), [], {}
    generator = torch.Generator().manual_seed(0)
    data = {"input_ids": torch.randint(5, models["a"].config.vocab_size, (256, 7), generator=generator)}

    def remembered(fit: Fit, site: RefitSite) -> dict[str, float]:
        if site.module.endswith("full_layer_layer_norm"):
            seen[site.node] = fit.values.of(site.output, MERGED, 0)[:4]  # of the last round at last
        return relative_errors(fit, site)

    for count in (0, 256):
        settings = {"written_samples": 0, "answer_steps": 0, "shared_steps": count}
        with patch.object(walk, "relative_errors", remembered):
            merged = merge(models, data, method="permute", refit=settings, corrections=())
        report = RefitReport.of(merged)
        assert report is not None
        left.append(max(max(own.values()) for name, own in report.errors.items() if "full_layer" in name))
    assert left[1] < 0.95 * left[0], left
    with torch.no_grad():
        stream = merged.trunk.albert(input_ids=data["input_ids"][:4]).last_hidden_state
    torch.testing.assert_close(stream, list(seen.values())[-1], rtol=1e-3, atol=1e-4)


def test_layers_that_run_again_are_fitted_through_all_rounds(monkeypatch: pytest.MonkeyPatch):
    """The same whatever the micro-batches: it is the last round that is off most."""
    monkeypatch.setattr(steps, "SAMPLES", 8)
    models = experts("albert")
    ids = torch.randint(3, 49, (2, 64, 7), generator=torch.Generator().manual_seed(0))
    data, last = {t: {"input_ids": x} for t, x in zip("ab", ids, strict=True)}, []
    for count, micro_batch in ((0, 16), (32, 16), (32, 8)):
        refit = {"shared_steps": count, "answer_steps": 0, "rows_per_input": 0, "micro_batch": micro_batch}
        refit |= {"written_samples": 0, "ridge": 1e-4}
        merged = merge(dict(zip("ab", models, strict=True)), data, method="identity", refit=refit, corrections=())
        errors = RefitReport.of(merged).errors
        last.append(sum(next(own for name, own in errors.items() if name.endswith("layer_norm.weight")).values()))
    before, after, again = last
    assert after < 0.7 * before
    assert after == pytest.approx(again, rel=0.02)


@pytest.mark.parametrize(("name", "again"), [("albert", True), ("deberta-v2", False), ("gpt2", False)])
def test_which_classes_have_layers_that_run_again(name: str, again: bool):
    """Not those that share a table, or maps that write into no stream."""
    model = case(name).model
    spec = MergeSpec.from_model(model)
    program = Program(model, fitted(adapter_for(model).inputs(model), model), adapter_for(model).outputs(model))
    trunk = frozenset(spec.axes)
    sites = find_sites(program, trunk, spec.head)
    groups = recurring(program, find_shared(program, trunk, spec.head), sites.values())
    assert bool(groups) == again
    if again:
        assert {len(places) for places in groups} == {model.config.num_hidden_layers}
        weighing = [node for node in rounds_of(program, groups) if op_name(node) == "scaled_dot_product_attention"]
        assert len(weighing) == model.config.num_hidden_layers
