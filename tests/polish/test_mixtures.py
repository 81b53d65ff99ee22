"""WEMoE: every sample runs through MLPs whose weights are what the equations say, whoever asks."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForImageClassification

from hf_zipit import merge
from hf_zipit.errors import ExpertError, RecipeError, ZipItError
from hf_zipit.modeling.residues import residue_bytes
from hf_zipit.polish import loop

from .. import tiny


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TEXTS = torch.arange(3, 27).view(4, 6)
MASK = (torch.arange(6) < torch.tensor([6, 3, 4, 6])[:, None]).long()
INPUTS: dict[str, dict[str, Tensor]] = {
    "vit": {"pixel_values": draw(4, 3, 16, 16)},
    "bert-sequence": {"input_ids": TEXTS, "attention_mask": MASK},
    "llama-sequence": {"input_ids": TEXTS, "attention_mask": MASK},
    "gpt2-sequence": {"input_ids": TEXTS, "attention_mask": MASK},
}
"""Of models with plain MLPs, with padding, with a gate, and with turned matrices."""

MLPS = {
    "vit": "vit.layers.{}.mlp", "bert-sequence": None, "llama-sequence": "model.layers.{}.mlp",
    "gpt2-sequence": "transformer.h.{}.mlp",
}  # fmt: skip
"""The modules that are one MLP each, where there are such."""

PAD = {"num_labels": 3, "pad_token_id": 0}
MADE = {
    "llama-sequence": tiny.of(T.LlamaForSequenceClassification, T.LlamaConfig, **tiny.DECODER, **PAD),
    "gpt2-sequence": tiny.of(T.GPT2ForSequenceClassification, T.GPT2Config, **tiny.GPT, **PAD),
}


@cache
def world(family: str) -> tuple[dict[str, nn.Module], nn.Module]:
    """Two experts, and their base."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = MADE[family]() if family in MADE else tiny.build(family, 0, num_labels=3)
    experts = {}
    for seed, name in enumerate("ab", 1):
        experts[name] = copy.deepcopy(base)
        for number, parameter in enumerate(experts[name].parameters()):
            parameter.data += 0.1 * draw(*parameter.shape, seed=1000 * seed + number)
    return experts, base


def merged(family: str = "vit", **settings: Any) -> nn.Module:
    experts, base = world(family)
    data = dict.fromkeys(experts, INPUTS[family])
    settings = {"method": "identity", "combine": "task-arithmetic", "corrections": (), "refit": False, **settings}
    return merge(experts, data, base=base, **settings)


@cache
def routed(family: str = "vit", **options: int) -> nn.Module:
    """A merge with routers of drawn weights, which weigh every sample otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Loop, "run", lambda self: self._measure() or self.progress)
        found = merged(family, polish={"kind": "wemoe", "options": options})
    for number, mixture in enumerate(found.mixtures):
        for parameter in (mixture.down, mixture.inner, mixture.up, mixture.outer):
            parameter.data.copy_(0.5 * draw(*parameter.shape, seed=number))
    return found


@torch.no_grad()
def logits(model: nn.Module, family: str = "vit", task: Any = None, **more: Tensor) -> Tensor:
    return model(**{**INPUTS[family], **more}, task=task).logits


def weights(mixture: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """Of one sample `[positions, units]`, float64."""
    down, inner, up, outer = (p.double() for p in (mixture.down, mixture.inner, mixture.up, mixture.outer))
    by_position = (x.double() @ down.T + inner).relu() @ up.T + outer
    return (by_position if mask is None else by_position[mask.bool()]).mean(0)


@pytest.mark.parametrize("family", [name for name, mlp in MLPS.items() if mlp])
@torch.no_grad()
def test_every_sample_has_the_mlps_that_the_equations_say(family: str) -> None:
    experts, base = world(family)
    model, mask = routed(family), INPUTS[family].get("attention_mask")
    assert len(model.mixtures) == 2
    for number, mixture in enumerate(model.mixtures):
        path, seen = MLPS[family].format(number), []
        mlp = model.trunk.get_submodule(path)
        handle = mlp.register_forward_hook(lambda module, args, output, seen=seen: seen.append((args[0], output)))
        logits(model, family)
        handle.remove()
        ((entered, left),) = seen
        plain = copy.deepcopy(base.get_submodule(path))
        own = [expert.get_submodule(path).state_dict() for expert in experts.values()]
        for sample, (x, y) in enumerate(zip(entered, left, strict=True)):
            gates = weights(mixture, x, None if mask is None else mask[sample])
            start = plain.state_dict()
            wanted = {
                name: tensor + sum((0.4 + gate) * (task[name] - tensor) for gate, task in zip(gates, own, strict=True))
                for name, tensor in start.items()
            }
            wanted = {name: tensor.float() for name, tensor in wanted.items()}
            assert (functional_call(plain, wanted, x[None])[0] - y).norm() < 2e-3 * y.norm()  # in half precision
            assert (plain(x[None])[0] - y).norm() > 0.1 * y.norm()
        assert gates.std() > 0.01


@pytest.mark.parametrize("family", INPUTS)
def test_a_named_task_chooses_the_head_alone(family: str) -> None:
    model = routed(family)
    joint = logits(model, family)
    alone = torch.cat([logits(model, family, task) for task in "ab"], 1)
    torch.testing.assert_close(joint, alone)
    assert (joint - logits(merged(family), family)).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["vit", "bert-sequence"])
def test_a_sample_is_weighed_without_the_others_and_without_padding(family: str) -> None:
    model, inputs = routed(family), INPUTS[family]
    whole = logits(model, family)
    lengths = MASK.sum(1).tolist() if "attention_mask" in inputs else [None] * 4
    for sample, length in enumerate(lengths):
        alone = {name: tensor[sample : sample + 1, :length] for name, tensor in inputs.items()}
        torch.testing.assert_close(logits(model, family, **alone)[0], whole[sample], rtol=1e-4, atol=1e-5)


def test_low_rank_vectors_are_smaller_and_with_all_ranks_the_same() -> None:
    small, full = routed(hidden=4, rank=2), routed(hidden=4, rank=99)
    assert [mixture.vectors[0]["a"]["weight"].size for mixture in full.mixtures] == [32, 32]
    torch.testing.assert_close(logits(full), logits(routed(hidden=4)), rtol=1e-2, atol=1e-2)
    assert residue_bytes(small)[1] < residue_bytes(routed(hidden=4))[1] / 3
    assert residue_bytes(small)[0] == sum(x.nbytes for x in merged().state_dict().values())


def test_the_card_tells_what_the_routers_take(tmp_path: Path) -> None:
    model = routed()
    model.save_pretrained(tmp_path)
    own, more = residue_bytes(model)
    card = " ".join((tmp_path / "README.md").read_text().split())
    assert "In 2 MLPs the experts' task vectors are weighed for every sample by small trained routers" in card
    assert f"(WEMoE): {more / 1024:.1f} KiB" in card
    assert f"{1 + more / own:.3f} times as large" in card and "a residue of its own weights" not in card
    assert torch.equal(logits(AutoModelForImageClassification.from_pretrained(tmp_path)), logits(model))


def test_a_copy_has_routers_of_its_own_and_takes_them_to_another_dtype() -> None:
    model = routed()
    before = logits(model)
    twin = copy.deepcopy(model)
    for mixture in twin.mixtures:
        mixture.outer.data.zero_(), mixture.up.data.zero_()
    torch.testing.assert_close(logits(twin), logits(merged()))
    assert torch.equal(logits(model), before)
    half = copy.deepcopy(model).to(torch.bfloat16)
    torch.testing.assert_close(
        half(INPUTS["vit"]["pixel_values"].bfloat16()).logits.float(), before, rtol=0.2, atol=0.1
    )


def test_routers_learn_whose_sample_it_is() -> None:
    """Two tasks with inputs that differ: towards the experts' answers their samples come to be weighed otherwise."""
    experts, base = world("vit")
    data = {task: draw(48, 3, 16, 16, seed=seed) + shift for task, seed, shift in (("a", 1, 1.0), ("b", 2, -1.0))}
    settings = {"method": "identity", "combine": "task-arithmetic", "refit": False, "corrections": ()}
    polish = {"kind": "wemoe-distilled", "steps": 24, "evaluate_every": 12, "learning_rate": 3e-2}
    model = merge(experts, data, base=base, polish=polish, **settings)
    report = model.config.method["polished"]
    assert report["loss"][1] < 0.5 * report["loss"][0]
    seen: list[Tensor] = []
    model.mixtures[-1].register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    for task in "ab":
        model(pixel_values=data[task])
    apart = (seen[0].mean(0) - seen[1].mean(0)).abs()
    assert (apart > 2 * torch.stack(seen).std(1).mean(0)).any()


@pytest.mark.parametrize("kind", ["wemoe", "wemoe-distilled"])
def test_mistakes_are_told_before_any_work(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_zipit.merging.align_trunk", None)
    for option in ("hidden", "rank"):
        with pytest.raises(RecipeError, match=f"{kind}'s option {option} is -1; it must be 0 or more"):
            merged(polish={"kind": kind, "options": {option: -1}})
    with pytest.raises(RecipeError, match="residues add them as well; leave one out"):
        merged(polish=kind, residues=1.1)
    for family, inputs, message in (
        ("resnet-basic", {"pixel_values": draw(4, 3, 32, 32)}, "MLPs of the trunk, and that of ResNet.* has none"),
        ("gpt2", {"input_ids": TEXTS}, "over all of a sample's positions, but GPT2LMHeadModel writes one after"),
    ):
        model = tiny.build(family)
        with pytest.raises(RecipeError, match=message):
            merge(
                {"a": model, "b": model}, inputs, method="identity", combine="task-arithmetic", base=model,
                polish=kind, refit=False,
            )  # fmt: skip


def test_a_routed_model_is_no_plain_one_and_has_one_set_of_routers() -> None:
    with pytest.raises(ExpertError, match="its MLPs are weighed for every sample"):
        routed().expert("a")
    with pytest.raises(ZipItError, match="weighed for every sample already"):
        routed().add_mixtures([])
    with pytest.raises(ZipItError, match="mixtures names 'vit.layers.9', which is not a module of the trunk"):
        merged().add_mixtures([{"layers": ["vit.layers.9"], "hidden": 1, "rank": 0}])
