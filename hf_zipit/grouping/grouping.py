"""Which experts to merge with which: what each loses in a merge with each other, and the groups that lose least.

Every pair of experts is merged as all are to be, and measured on samples that the merges have not read. What a task
loses with each of the others is added up to what it is expected to lose in a group, as task groupings for joint
training are found from pairs of tasks (Standley et al., Which Tasks Should Be Learned Together in Multi-task
Learning?, arXiv 1905.07553, who take the mean). So T experts take T (T - 1) / 2 merges of two, and no merge of more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from accelerate import Accelerator
from transformers.utils.logging import tqdm

from hf_zipit.config import MergeConfig
from hf_zipit.data.held_out import Answers, held_out, limit, read_divided
from hf_zipit.errors import RecipeError
from hf_zipit.evaluation.losses import losses
from hf_zipit.experts.loading import Experts, load_experts
from hf_zipit.grouping.partition import MOST, best_partition
from hf_zipit.merging import merge, plan, split_settings
from hf_zipit.schema import Plain
from hf_zipit.searching.trials import no_bars


@dataclass(frozen=True)
class Grouping(Plain):
    """What tasks lose with each other.

    Attributes:
        groups: the groups that are expected to lose least together.
        loses: `loses[a][b]` is by how much the loss of task a rises in a merge with b alone, mean cross-entropy in
            nats; below zero where the merged model is nearer than its expert to what is right.
        errs: the same for the share of wrong answers.
        method: how pairs were merged, as plans name it.
        answers: who said what is right: the data's `labels`, or the `experts`.
        samples: how many of each task were measured on.
    """

    groups: tuple[tuple[str, ...], ...]
    loses: Mapping[str, Mapping[str, float]]
    errs: Mapping[str, Mapping[str, float]]
    method: str
    answers: str
    samples: Mapping[str, int]

    def expected(self, task: str) -> float:
        """What a task is expected to lose in its group: the sum over the others there, in nats."""
        group = next(group for group in self.groups if task in group)
        return sum(self.loses[task][other] for other in group if other != task)

    def divided(self, groups: int) -> Grouping:
        """The same measurements, with another number of groups. Raises RecipeError if there cannot be so many."""
        tasks = list(self.loses)
        check_groups(len(tasks), groups)
        costs = [[self.loses[a].get(b, 0.0) for b in tasks] for a in tasks]
        found = best_partition(costs, groups)
        return replace(self, groups=tuple(tuple(tasks[i] for i in group) for group in found))


def group(
    experts: Experts,
    calibration: Any,
    config: MergeConfig | None = None,
    *,
    groups: int = 2,
    validation: Any = None,
    samples: int = 512,
    hold_out: float = 0.25,
    answers: Answers = "auto",
    accelerator: Accelerator | None = None,
    **settings: Any,
) -> Grouping:
    """Measure how much experts disturb each other in merges of two, and divide them into groups.

    Args:
        experts: three models or more by task name, as for `merge`.
        calibration: a little data, as for `merge`; one part is what merges read, another is measured on.
        config: of the merges; or its fields as keywords, as for `merge`.
        groups: how many models there are to be in the end.
        validation, hold_out, answers: of the samples that are measured on: see `hf_zipit.search`.
        samples: of each task, at most, that are measured on.
        accelerator: where to run.
        settings: fields of `MergeConfig`, and `processor`, `columns` and `batch_size` of `Calibration`.

    Raises:
        RecipeError: if there are fewer than three experts or more than twelve, or not as many as groups.
        ExpertError, DataError, SpecError: as `merge` and `search` do.
    """
    reading, settings = split_settings(settings)
    config = MergeConfig.of(config, **settings)
    loaded = load_experts(experts)
    check_groups(len(loaded), groups)
    method = plan(loaded, config, data=True).config.name  # and what is wrong is found before work starts
    data, rest = read_divided(
        calibration, validation, loaded, hold_out, config.seed, accelerator=accelerator, **reading
    )
    held = held_out(limit(rest, samples, config.seed), loaded, answers=answers)
    size = data.batch_size
    alone = losses(loaded, held, size)
    loses: dict[str, dict[str, float]] = {task: {} for task in loaded}
    errs: dict[str, dict[str, float]] = {task: {} for task in loaded}
    for pair in tqdm(list(combinations(loaded, 2)), desc="merging pairs", unit="merge"):
        with no_bars():
            merged = merge({task: loaded[task] for task in pair}, data.of_tasks(pair), config)
        found = losses(merged, replace(held, tasks={task: held.tasks[task] for task in pair}), size)
        for task, other in (pair, pair[::-1]):
            loses[task][other], errs[task][other] = (
                now - before for now, before in zip(found[task], alone[task], strict=True)
            )
    return Grouping((), loses, errs, method, held.answers, held.counts).divided(groups)


def check_groups(experts: int, groups: int) -> None:
    """Raises RecipeError where so many experts cannot be divided into so many groups."""
    if not 3 <= experts <= MOST:
        raise RecipeError(f"Grouping takes 3 to {MOST} experts, and there are {experts}.")
    if not 1 <= groups <= experts:
        raise RecipeError(f"{experts} experts make 1 to {experts} groups; groups is {groups}.")
