"""`hf-zipit run` and `merge` killed over an old result leave the old or the new one; the next run leaves no strays.

They are killed before file events of theirs and, by the clock, at random moments of the whole command.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

from hf_zipit.cli import main
from hf_zipit.modeling import ZipItForImageClassification

from .killing import EVERYTHING, points, run, run_for
from .test_kills import content, same

NOTES = "thesis.tex"

slow = pytest.mark.skipif(not EVERYTHING, reason="takes minutes; what they write is killed in test_kills.py")


@dataclass(frozen=True)
class Command:
    """A command that writes into a folder, once at depth 1 and once at depth 0.5.

    Attributes:
        work: calls it with a depth.
        out: everything that it writes.
        model: the merged model in there.
    """

    work: Callable[[float], object]
    out: Path
    model: Path

    def state(self) -> dict[str, Tensor]:
        """The model's tensors as transformers loads them, which repairs nothing."""
        return dict(ZipItForImageClassification.from_pretrained(self.model).state_dict())

    def content(self) -> dict[str, object]:
        """Every file but for how long merging took."""
        found: dict[str, object] = dict(content(self.out))
        if "results.json" in found:
            results = json.loads(found["results.json"])
            found["results.json"] = [{**row, "seconds": 0} for row in results["results"]]
        return found


def call(*arguments: object) -> None:
    sys.argv = ["hf-zipit", *map(str, arguments)]
    try:
        main()
    except SystemExit as end:
        assert not end.code, "the command itself failed"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two experts for digits, and a recipe for each depth."""
    root = tmp_path_factory.mktemp("commands")
    for seed, (name, digits) in enumerate({"low": "01", "high": "789"}.items()):
        config = ViTConfig(
            image_size=8, patch_size=4, num_channels=1, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, id2label=dict(enumerate(digits)),
            label2id={label: i for i, label in enumerate(digits)},
        )  # fmt: skip
        torch.manual_seed(seed)
        ViTForImageClassification(config).save_pretrained(root / name)
    for depth in (1.0, 0.5):
        recipe = {
            "name": "killed", "threads": 1, "experts": {name: {"model": str(root / name)} for name in ("low", "high")},
            "calibration": {"dataset": "sklearn-digits", "samples": 16},
            "evaluation": {"dataset": "sklearn-digits", "samples": 16},
            "method": "zip", "depth": [depth, 0.0], "output": str(root / "run"),
        }  # fmt: skip
        (root / f"{depth}.yaml").write_text(yaml.safe_dump(recipe))
    return root


@pytest.fixture(params=["merge", "run"])
def command(request: pytest.FixtureRequest, root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Command]:
    monkeypatch.setattr(sys, "argv", sys.argv)
    if request.param == "run":
        made = Command(lambda depth: call("run", root / f"{depth}.yaml", "-q"), root / "run", root / "run" / "model")
    else:
        experts = [f"{name}={root / name}" for name in ("low", "high")]
        out = root / "merged"
        made = Command(lambda depth: call("merge", *experts, "-o", out, "-d", depth, "-q"), out, out)
    made.work(1.0)  # imports everything once, so that the killed processes need not
    (made.model / NOTES).write_text("years of work")
    yield made


def check(command: Command, kill: Callable[[int], object], times: Iterator[int]) -> None:
    """Kill the command at depth 0.5 over its result at depth 1, again and again."""
    states, wanted = {}, {}
    for name, depth in (("new", 0.5), ("old", 1.0)):
        assert run_for(lambda depth=depth: command.work(depth)) is not None
        states[name], wanted[name] = command.state(), command.content()
    found = {"old": 0, "new": 0}
    for point in times:
        kill(point)
        loaded = command.state()
        name = next((name for name, state in states.items() if same(state, loaded)), None)
        assert name, f"killed at {point}, the folder holds neither model"
        found[name] += 1
        assert run_for(lambda: command.work(1.0)) is not None
        left = command.content()
        other = sorted(n for n in {*left, *wanted["old"]} if left.get(n) != wanted["old"].get(n))
        assert not other, f"killed at {point}, the next run leaves others of {other}"
    print(f"killed {sum(found.values())} times: {found}")


@slow
def test_killed_at_a_file_event(command: Command, root: Path) -> None:
    count = run(lambda: command.work(0.5), command.out)
    assert count
    check(command, lambda point: run(lambda: command.work(0.5), command.out, point), points(count, count))


@slow
def test_killed_at_a_random_moment(command: Command) -> None:
    seconds = run_for(lambda: command.work(0.5))
    draw = random.Random(0)
    kill = lambda point: run_for(lambda: command.work(0.5), draw.uniform(0, seconds))  # noqa: E731
    check(command, kill, iter(range(100)))
