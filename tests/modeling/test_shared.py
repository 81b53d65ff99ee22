"""The stand-in for shared modules: remembers only within a joint forward, whatever models do to what they get."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from hf_zipit.errors import ZipItError
from hf_zipit.modeling.trunk import Shared, check_shared, make_branch, run_together, take_trunk


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.calls = 0

    def forward(self, x: Tensor) -> BaseModelOutput:
        self.calls += 1
        return BaseModelOutput(last_hidden_state=self.linear(x))


class Model(nn.Module):
    """Calls its body twice, as models with shared layers do, and writes into what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Body()
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor, in_place: bool = False) -> Tensor:
        output = self.body(self.body(x).last_hidden_state)
        if in_place:
            output.last_hidden_state += 1
        else:
            output.last_hidden_state = output.last_hidden_state + 1  # CLIP assigns to fields of outputs
        return self.head(output.last_hidden_state)


def two_branches() -> tuple[nn.Module, list[nn.Module], list[Model]]:
    torch.manual_seed(0)
    models = [Model(), Model()]
    models[1].body.load_state_dict(models[0].body.state_dict())
    trunk = take_trunk(models[0], ["body"])
    plain = copy.deepcopy(models)
    return trunk, [make_branch(model, trunk, ["body"]) for model in models], plain


@torch.no_grad()
@pytest.mark.parametrize("in_place", [False, True])
def test_branches_may_change_what_they_get(in_place: bool) -> None:
    trunk, branches, plain = two_branches()
    x = torch.randn(4, 3)
    with run_together() as memo:
        for branch, model in zip(branches, plain, strict=True):
            memo.next_branch()
            assert torch.equal(branch(x, in_place), model(x, in_place))
    assert trunk.body.calls == (3 if in_place else 2)


def test_nothing_is_remembered_after_an_error() -> None:
    trunk, branches, plain = two_branches()
    x = torch.randn(4, 3)
    with pytest.raises(RuntimeError), run_together():
        branches[0](x)
        raise RuntimeError
    other = torch.randn(4, 3)
    assert torch.equal(branches[0](other), plain[0](other))
    assert trunk.body.calls == 4


def test_attributes_are_the_trunk_modules() -> None:
    trunk, branches, _ = two_branches()
    assert branches[0].body.linear is trunk.body.linear
    assert not list(branches[0].body.parameters())
    with pytest.raises(AttributeError):
        branches[0].body.nonsense  # noqa: B018


def test_a_stand_in_can_be_pickled_with_its_trunk() -> None:
    trunk, branches, plain = two_branches()
    loaded = pickle.loads(pickle.dumps(branches[1]))
    x = torch.randn(4, 3)
    assert torch.equal(loaded(x), plain[1](x))
    assert loaded.body.target is not trunk.body


def test_the_whole_model_can_be_shared() -> None:
    model = Model()
    trunk = take_trunk(model, [""])
    branch = make_branch(Model(), trunk, [""])
    assert isinstance(branch, Shared)
    assert branch.target is model


@pytest.mark.parametrize(
    ("shared", "message"), [(["bodi"], "'bodi' does not exist"), (["body", "body.linear"], "inside")]
)
def test_shared_paths_are_checked(shared: list[str], message: str) -> None:
    with pytest.raises(ZipItError, match=message):
        check_shared(Model(), shared)
