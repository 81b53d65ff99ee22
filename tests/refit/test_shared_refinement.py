"""Layers that run again and again, fitted through all rounds."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from hf_zipit import merge
from hf_zipit.refit import RefitReport, walk
from hf_zipit.refit.fit import Fit, relative_errors
from hf_zipit.refit.program import Program
from hf_zipit.refit.shared_refinement import recurring
from hf_zipit.refit.solvable import RefitSite, find_shared, find_sites
from hf_zipit.refit.values import MERGED

from .. import tiny


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

    for steps in (0, 256):
        settings = {"written_samples": 0, "answer_steps": 0, "shared_steps": steps}
        with patch.object(walk, "relative_errors", remembered):
            merged = merge(models, data, method="permute", refit=settings, corrections=())
        report = RefitReport.of(merged)
        assert report is not None
        left.append(max(max(own.values()) for name, own in report.errors.items() if "full_layer" in name))
    assert left[1] < 0.95 * left[0], left
    with torch.no_grad():
        stream = merged.trunk.albert(input_ids=data["input_ids"][:4]).last_hidden_state
    torch.testing.assert_close(stream, list(seen.values())[-1], rtol=1e-3, atol=1e-4)
