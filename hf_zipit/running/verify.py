"""What a merged model claims of itself, checked again: weights, experts, recipe, licence, scores.

Everything is read from the model's own configuration and files. Experts are loaded one after the other from where they
are said to come from, at the commit that is recorded; scores are measured where a data set is named.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from transformers import PreTrainedModel

from hf_zipit.data.calibration import Calibration
from hf_zipit.errors import DataError, ZipItError
from hf_zipit.evaluation.intervals import Interval
from hf_zipit.evaluation.measure import accuracy
from hf_zipit.experts.fingerprint import fingerprint_experts
from hf_zipit.experts.licences import merged_licence
from hf_zipit.experts.loading import load_expert
from hf_zipit.experts.origins import card_data
from hf_zipit.hub.cache import local_folder
from hf_zipit.modeling import ZipItPreTrainedModel
from hf_zipit.recipe.sections import Data, Recipe
from hf_zipit.report.card import RECIPE, Result
from hf_zipit.report.doctor import Check
from hf_zipit.report.recorded import recorded_recipe
from hf_zipit.running.data import calibration_data, merged_task_data, unlabelled
from hf_zipit.running.experts import Say, recipe_experts
from hf_zipit.running.saved import load_merged

SAME = 0.005
"""Two measurements on the same samples may differ so much: another machine adds in another order."""


def verify(
    source: str, data: Data | None = None, classes: Mapping[str, Sequence[int | str]] | None = None,
    say: Say = lambda _: None, *, calibration: bool = False,
) -> list[Check]:  # fmt: skip
    """The findings, one for every claim; `good` is False where a claim does not hold.

    Args:
        source: a repo id or folder of a merged model.
        data: what to measure its scores on again; without it they are not checked.
        classes: by task, what the data calls its classes: see `merged_task_data`.
        say: is told what is being done.
        calibration: whether to read the calibration data again, too, which its recipe names.

    Raises:
        ExpertError: the model cannot be loaded, or is not a merged one.
        DataError: the data cannot be used.
    """
    say(f"loading {source}")
    model = load_merged(source)
    return [
        _weights(model),
        *_experts(model, say),
        _recipe(model, source),
        _licence(model, source),
        *([_calibration(model, say)] if calibration else ()),
        *(_scores(model, source, data, classes, say) if data else ()),
    ]


def _weights(model: PreTrainedModel) -> Check:
    claimed = model.config.method.get("sha256")
    if claimed is None:
        return Check("weights", "no sha256 is recorded", False, "merge again with this version")
    found = fingerprint_experts({"": model})[""]
    if found == claimed:
        return Check("weights", f"sha256 {found[:12]}..., as the merge left them")
    return Check(
        "weights", f"sha256 {found[:12]}..., not {claimed[:12]}...", False,
        "they were trained further, cast or changed: nothing that was measured of the merge holds for them",
    )  # fmt: skip


def _experts(model: PreTrainedModel, say: Say) -> Iterator[Check]:
    """One expert after the other, so that no more than one is in memory; one that is a merged model is loaded once."""
    origins: Mapping[str, Mapping[str, Any]] = model.config.method.get("experts", {})
    last: tuple[str, PreTrainedModel] | None = None
    for task in model.config.tasks:
        origin, what = origins.get(task, {}), f"expert {task}"
        if not origin.get("model"):
            yield Check(what, "made on the spot, so that there is nothing to compare with")
            continue
        place = origin["model"]
        if inner := origin.get("subfolder"):
            place = f"{place}@{origin.get('revision') or 'main'}/{inner}"
        say(f"checking the expert {task}")
        try:
            if last is None or last[0] != place:
                last = place, load_expert(task, place, None if inner else origin.get("revision"))
            loaded = last[1]
            if isinstance(loaded, ZipItPreTrainedModel) and origin.get("task"):
                loaded = loaded.expert(origin["task"])
        except ZipItError as error:
            yield Check(what, str(error), False, "ask whoever merged it where the expert is now")
            continue
        found, claimed = fingerprint_experts({"": loaded})[""], origin.get("sha256", "")
        told = f"{place}, sha256 {found[:12]}..."
        if found == claimed:
            yield Check(what, told)
        else:
            yield Check(
                what, f"{told}, not {claimed[:12]}...", False, "it was changed since, or another one was merged"
            )


def _recipe(model: PreTrainedModel, source: str) -> Check:
    """The file beside the weights says what the configuration remembers, but for the name."""
    folder = local_folder(source, fetch=[RECIPE])
    path = folder and folder / RECIPE
    if not path or not path.is_file():
        return Check("recipe", f"there is no {RECIPE}", False, "hf-zipit card MODEL --write makes it again")
    written, recorded = yaml.safe_load(path.read_text(encoding="utf-8")), recorded_recipe(model, "")
    recorded = yaml.safe_load(yaml.safe_dump(recorded))
    keys = {key for key in {*written, *recorded} - {"name"} if written.get(key) != recorded.get(key)}
    if keys:
        return Check("recipe", f"{RECIPE} differs in {', '.join(sorted(keys))}", False, "hf-zipit card MODEL --write")
    return Check("recipe", f"{RECIPE} is what the model was made by")


def _calibration(model: PreTrainedModel, say: Say) -> Check:
    """What the recipe's calibration data is now, beside what the merge read."""
    what, method = "calibration data", model.config.method
    claimed = (method.get("calibration_data") or {}).get("sha256")
    recipe = Recipe.from_dict(recorded_recipe(model, "again"))
    if claimed is None or recipe.calibration is None:
        told = "none was read" if claimed is None else "it was passed from Python, so that no recipe names it"
        return Check(what, told)
    say("reading the calibration data")
    try:
        experts = recipe_experts(recipe, say, train=False, as_stored=True)
        data = unlabelled(calibration_data(recipe, experts))
        read = Calibration(data, batch_size=recipe.calibration.batch_size).read(experts)
        found = read.fingerprint()["sha256"]
    except ZipItError as error:
        return Check(what, str(error), False, "ask whoever merged it where the data is now")
    if found == claimed:
        return Check(what, f"{sum(read.counts.values()):,} samples, sha256 {found[:12]}...")
    return Check(what, f"sha256 {found[:12]}..., not {claimed[:12]}...", False, "the data set was changed since")


def _licence(model: PreTrainedModel, source: str) -> Check:
    claimed = card_data(source).get("license")
    follows = merged_licence(model.config.method.get("experts", {})).get("license")
    if claimed == follows:
        return Check("licence", claimed or "none is claimed: it does not follow from the experts'")
    remedy = "compare it with the experts' licences yourself" if follows is None else f"the experts' ask for {follows}"
    return Check("licence", f"the card says {claimed}", False, remedy)


def _scores(
    model: PreTrainedModel, source: str, data: Data, classes: Mapping[str, Sequence[int | str]] | None, say: Say
) -> Iterator[Check]:
    claimed = Result.of(model, source).merged
    if claimed is None:
        raise DataError(f"{source} claims no scores, so there is nothing to measure again; leave the data set out.")
    say("measuring")
    found = accuracy(model, merged_task_data(model, source, data, list(claimed.per_task), classes, say))
    for task, value in claimed.per_task.items():
        told = f"claimed {value:.3f}, measured {found.per_task[task]:.3f} on {found.samples[task]:,} samples"
        inside = _holds(value, found.intervals[task], same=found.samples[task] == claimed.samples.get(task))
        yield Check(
            f"accuracy {task}", told, inside, "" if inside else "measure on the data set and split of the card"
        )


def _holds(claimed: float, found: Interval, same: bool) -> bool:
    """Whether a claim fits a measurement: on as many samples it must be equal, on others within the interval."""
    if same:
        return abs(claimed - found.value) <= SAME
    return found.low <= claimed <= found.high
