"""Statistics of layers: what they are, that they add, and their file; and merges that read them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hf_zipit import LayerStatistics, gather_statistics, merge
from hf_zipit.errors import DataError
from hf_zipit.observation.fisher import squared_gradients
from hf_zipit.observation.statistics import loaded
from hf_zipit.symmetry.proof import model_tensors
from tests import tiny

QUERY, FC2, NORM = (f"vit.layers.1.{name}.weight" for name in ("attention.q_proj", "mlp.fc2", "layernorm_before"))
PATCHES = "vit.embeddings.patch_embeddings.projection.weight"


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@cache
def experts() -> dict[str, nn.Module]:
    return dict(zip("ab", tiny.pair("vit"), strict=True))


@cache
def whole() -> LayerStatistics:
    data = {"a": images(10), "b": images(6, 1)}
    return gather_statistics(experts(), data, kinds=("grams", "fisher"), batch_size=4)


def inputs_of(model: nn.Module, path: str, x: Tensor) -> Tensor:
    """What a module reads, by a hook of its own."""
    seen = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(pixel_values=x)
    handle.remove()
    return seen[0].double()


@pytest.mark.parametrize("name", [QUERY, FC2, NORM, PATCHES])
def test_grams_are_the_second_moments_of_what_a_layer_reads(name: str):
    for task, x in (("a", images(10)), ("b", images(6, 1))):
        rows = inputs_of(experts()[task], name.removesuffix(".weight"), x)
        if name == PATCHES:
            rows = nn.functional.unfold(rows, 4, stride=4).mT
        rows = rows.flatten(0, -2)
        if name == NORM:
            rows = nn.functional.layer_norm(rows, rows.shape[-1:], eps=1e-12)
            expected = rows.square().mean(0)
        else:
            expected = rows.T @ rows / len(rows)
        torch.testing.assert_close(whole().mean("grams", task, name), expected, rtol=1e-5, atol=1e-6)


def test_layers_that_read_the_same_tensor_have_one_gram():
    same = {name for name in whole().same if name.startswith("vit.layers.1.")}
    assert same == {f"vit.layers.1.attention.{part}_proj.weight" for part in "kv"}
    assert torch.equal(whole().mean("grams", "a", QUERY), whole().mean("grams", "a", QUERY.replace("q_", "v_")))
    assert whole().mean("grams", "a", "classifier.weight") is None  # the head is no layer of the trunk


def test_fisher_is_the_mean_squared_gradient_of_the_models_own_predictions():
    """Over many drawn outcomes the mean is the expectation over classes, which a few classes allow to compute."""
    model, x = experts()["a"], images(1)
    generator = torch.Generator().manual_seed(0)
    drawn = (
        squared_gradients(model, {"pixel_values": x.expand(600, -1, -1, -1)}, [FC2], None, generator, 600)[FC2] / 600
    )
    probabilities = model(pixel_values=x).logits.detach().softmax(-1)[0]
    expected = torch.zeros_like(drawn)
    for k, p in enumerate(probabilities):
        outcome = model(pixel_values=x).logits.log_softmax(-1)[0, k]
        (gradient,) = torch.autograd.grad(outcome, [model.get_parameter(FC2)])
        expected += p * gradient.double().square()
    assert float((drawn - expected).norm() / expected.norm()) < 0.1
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert whole().mean("fisher", "a", FC2).shape == expected.shape


def test_what_two_owners_gathered_adds_up_to_the_statistics_of_all_data(tmp_path: Path):
    kinds = ("grams", "fisher")
    parts = [
        gather_statistics({"a": experts()["a"]}, {"a": images(10)[:8]}, kinds=kinds, batch_size=4),
        gather_statistics({"a": experts()["a"]}, {"a": images(10)[8:]}, kinds=kinds, batch_size=4, seed=2),
        gather_statistics({"b": experts()["b"]}, {"b": images(6, 1)}, kinds=kinds, batch_size=4),
    ]
    files = [part.save(tmp_path / f"{i}.safetensors") for i, part in enumerate(parts)]
    for found in (loaded(files), loaded(files[::-1])):
        assert found.fingerprint["samples"] == {"a": 10, "b": 6}
        assert found.fingerprint["experts"] == whole().fingerprint["experts"]
        for task in "ab":
            for name in (QUERY, FC2, NORM, PATCHES):
                expected = whole().mean("grams", task, name)
                torch.testing.assert_close(found.mean("grams", task, name), expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(
            found.mean("fisher", "b", FC2), parts[2].mean("fisher", "b", FC2), rtol=1e-9, atol=1e-15
        )
    with pytest.raises(DataError, match="some of the same data twice"):
        loaded([files[0], files[0]])


def test_a_file_comes_back_and_shows_if_it_was_changed(tmp_path: Path):
    path = whole().save(tmp_path / "s.safetensors")
    found = LayerStatistics.load(path)
    assert found.same == whole().same and found.fingerprint == whole().fingerprint
    for kind, by_task in whole().sums.items():
        for task, own in by_task.items():
            for name, values in own.items():
                again = found.sums[kind][task][name]
                assert again.count == values.count and torch.equal(again.total, values.total)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="was changed since it was written"):
        LayerStatistics.load(path)
    with pytest.raises(DataError, match="There is no statistics file"):
        LayerStatistics.load(tmp_path / "none")


def test_a_merge_reads_them_instead_of_data(tmp_path: Path):
    settings = {"method": "identity", "combine": "regmean"}
    path = whole().save(tmp_path / "s.safetensors")
    by_file = merge(experts(), statistics=path, **settings)
    by_data = merge(experts(), {"a": images(10), "b": images(6, 1)}, **settings)
    for name, tensor in model_tensors(by_file.trunk).items():
        torch.testing.assert_close(tensor, model_tensors(by_data.trunk)[name], rtol=1e-4, atol=1e-5)
    own, gram = [model.get_parameter(FC2).detach().double() for model in experts().values()], []
    for task in "ab":
        found = whole().mean("grams", task, FC2)
        gram.append(0.9 * found + 0.1 * torch.diag(found.diagonal()))
    expected = sum(w @ g for w, g in zip(own, gram, strict=True)) @ torch.linalg.inv(sum(gram))
    torch.testing.assert_close(by_file.trunk.get_parameter(FC2).double(), expected, rtol=1e-4, atol=1e-5)


def test_statistics_that_do_not_fit_are_told(tmp_path: Path):
    settings = {"method": "identity", "combine": "regmean"}
    with pytest.raises(DataError, match="reads statistics of the layers: pass a little unlabelled data"):
        merge(experts(), **settings)
    other = gather_statistics({"a": experts()["b"], "b": experts()["b"]}, {"a": images(2), "b": images(2, 1)})
    with pytest.raises(DataError, match="The statistics of 'a' are of other weights"):
        merge(experts(), statistics=other, **settings)
    only = gather_statistics({"a": experts()["a"]}, {"a": images(2)})
    with pytest.raises(DataError, match=r"no statistics of the expert 'b', only of \['a'\]"):
        merge(experts(), statistics=only, **settings)
    with pytest.raises(DataError, match="are to be added are of different weights"):
        only.merge(other)
    both = loaded([only, gather_statistics({"b": experts()["b"]}, {"b": images(2)})])
    with pytest.raises(DataError, match=r"hold no fisher.* gather them with kinds=\['fisher'\]"):
        merge(experts(), statistics=both, method="identity", combine="fisher")
    with pytest.raises(DataError, match="no statistics called 'gram'"):
        gather_statistics(experts(), {"a": images(2), "b": images(2)}, kinds=["gram"])
