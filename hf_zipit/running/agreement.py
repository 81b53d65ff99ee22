"""How often a merged model answers as its experts do: what a merge kept, where there are no labels to measure by."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedModel

from hf_zipit.data.calibration import Calibration
from hf_zipit.data.held_out import HeldOut, held_out
from hf_zipit.errors import DataError
from hf_zipit.modeling import ZipItModel, merged_class
from hf_zipit.recipe.sections import Recipe
from hf_zipit.running.data import calibration_data, unlabelled


def agreement_data(recipe: Recipe, experts: Mapping[str, PreTrainedModel], calibration: Calibration) -> HeldOut | None:
    """Samples with the experts' answers, of the recipe's calibration data but read by no merge.

    Where all of that data is read by the merges, it is their own data; None for experts that answer with no class.
    """
    if any(issubclass(merged_class(type(expert).__name__), ZipItModel) for expert in experts.values()):
        return None
    try:
        data = unlabelled(calibration_data(recipe, experts, held_out=True))
    except DataError:  # nothing is left
        return held_out(calibration, experts, answers="experts")
    fresh = Calibration(data, batch_size=recipe.calibration.batch_size, accelerator=calibration.accelerator)
    return held_out(fresh.read(experts), experts, answers="experts")
