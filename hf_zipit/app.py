"""A page in the browser: do two models fit, what would merging them cost, and how good is it on a few samples?

`hf-zipit app` serves it on this machine, `spaces/hf-zipit/` is the same page as a Space. What it does is in `examined`
and `merged`, which know nothing of a browser; `build` lays out the page around them.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hf_zipit.errors import RecipeError, ZipItError
from hf_zipit.evaluation.results import Accuracies, Measurement
from hf_zipit.experts.loading import task_name
from hf_zipit.extras import installed, require
from hf_zipit.hub.cache import is_repo
from hf_zipit.merging import plan
from hf_zipit.recipe.loading import check_recipe
from hf_zipit.recipe.sections import CalibrationData, ExpertEntry, Measured, Recipe, Save
from hf_zipit.report.costs import expected_costs
from hf_zipit.report.plots import accuracy_over_depth, save_picture
from hf_zipit.report.tables import kept_share, share
from hf_zipit.running.run import run_recipe

if TYPE_CHECKING:
    import gradio

DEPTHS = (1.0, 0.75, 0.5, 0.25)
KEPT_ROOMS = 3
"""Results of so many merges stay on the disk, so that they can be downloaded."""

Say = Callable[[str], None]

TITLE = "Merge two models of different tasks into one"
ABOUT = (
    "Give two models of one architecture: ids on the Hub{folders}. They may come from different initialisations and "
    "have different classes. *Check* says whether they fit and what the merge would cost; *Merge* merges them on a "
    "few unlabelled samples, at several depths (the share of the blocks that becomes one), and measures the results."
)


@dataclass(frozen=True)
class Merged:
    """What a merge made.

    Attributes:
        summary: what was kept, in Markdown.
        rows: for every depth the numbers, as text; `head` names the columns.
        picture: accuracy, or agreement with the experts, over depth; None where nothing draws.
        archive: the merged model as a zip.
    """

    summary: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    picture: Path | None
    archive: Path


def named(*sources: str, only_hub: bool = False) -> dict[str, str]:
    """The models by task, named like their repos or folders.

    Raises RecipeError if one is empty or, with `only_hub`, not a repo id.
    """
    experts: dict[str, str] = {}
    for number, source in enumerate(map(str.strip, sources), 1):
        if not source:
            raise RecipeError(f"Model {number} is empty; give an id such as google/vit-base-patch16-224.")
        if only_hub and not is_repo(source):
            raise RecipeError(f"{source} is not an id of a model on the Hub; folders can be named where you run this.")
        name = task_name(source)
        experts[f"{name}-{number}" if name in experts else name] = source
    return experts


def examined(experts: Mapping[str, str], samples: int) -> str:
    """Whether models fit each other, and what merging them would do, as Markdown. Raises ZipItError as `plan` does."""
    planned = plan(experts)
    sizes, costs = planned.parameters, expected_costs(planned, samples)
    movable = planned.coverage["movable"] / max(sizes["trunk"], 1)
    lines = [
        f"**They fit**: both are a `{planned.architecture}`.",
        "",
        "| what | how much |",
        "|---|---|",
        f"| one model | {sizes['expert']:,} parameters |",
        f"| both | {sizes['experts']:,} |",
        f"| merged | {sizes['merged']:,}, of which {sizes['trunk']:,} are shared |",
        f"| free to be reordered | {movable:.0%} of the shared weights, in {len(planned.spec.probes)} places |",
        f"| method | {planned.config.name} |",
        *(f"| {name} | {told.strip()} |" for name, _, told in (line.partition(" ") for line in costs.lines())),
    ]
    return "\n".join(lines)


def merged(
    experts: Mapping[str, str], data: str, samples: int, depths: Sequence[float], measure: bool, room: Path,
    say: Say = lambda _: None,
) -> Merged:  # fmt: skip
    """Merge models at several depths, measure each, and keep the deepest.

    Args:
        experts: ids or folders by task.
        data: a data set of the Hub, a folder, a file or `sklearn-digits`, of whose split `train` samples are read.
        samples: so many of each task.
        depths: shares of the blocks.
        measure: on the labels of its split `test`; else it is told how often the experts' answers come out.
        room: an empty folder.
        say: is told what is being done.

    Raises:
        ZipItError: as `run_recipe` does.
    """
    if not data.strip():
        raise RecipeError("Merging reads a few unlabelled samples; name a data set.")
    if not depths:
        raise RecipeError("Choose at least one depth.")
    ordered = tuple(sorted(map(float, depths), reverse=True))
    recipe = Recipe(
        name="-".join(experts), experts={task: ExpertEntry(model=source) for task, source in experts.items()},
        calibration=CalibrationData(data.strip(), samples=samples), depth=ordered, save=Save("auto", ordered[0]),
        evaluation=Measured(data.strip(), samples=500) if measure else None, output=room / "out",
    )  # fmt: skip
    check_recipe(recipe)
    result = run_recipe(recipe, say=say)
    rows = [row if measure else replace(row, accuracy=row.agreement) for row in result.rows]
    beside = result.experts or _agreed(rows)
    total, tasks = result.expert_parameters, list(experts)
    what = "accuracy" if measure else "same answer"
    picture = None
    if beside is not None and installed("matplotlib"):
        picture = save_picture(accuracy_over_depth(rows, beside, what), room / "depths.png")
    model = result.model.rename(room / "model")
    archive = shutil.make_archive(str(room / recipe.name), "zip", model)
    return Merged(
        _summary(rows, beside, total, measure),
        ["depth", "parameters", "of both", *(f"{what}, {task}" for task in tasks)],
        [_cells(row, total, tasks) for row in rows],
        picture,
        Path(archive),
    )


def _agreed(rows: Sequence[Measurement]) -> Accuracies | None:
    """What experts have in common with themselves; None for models that answer with no class."""
    if rows[0].accuracy is None:
        return None
    samples = rows[0].accuracy.samples
    return Accuracies(dict.fromkeys(samples, 1.0), {}, samples)


def _cells(row: Measurement, total: int, tasks: Sequence[str]) -> list[str]:
    measured = [share(row.accuracy.per_task.get(task)) if row.accuracy else "-" for task in tasks]
    return [f"{row.depth:.2f}", f"{row.parameters:,}", f"{row.parameters / total:.0%}", *measured]


def _summary(rows: Sequence[Measurement], beside: Accuracies | None, total: int, measure: bool) -> str:
    deepest = rows[0]
    told = f"**One model of {deepest.parameters:,} parameters in place of {total:,}**"
    if deepest.accuracy is None or beside is None:
        return f"{told}. These models answer with no class, so nothing was measured."
    kept = kept_share(deepest.accuracy, beside)
    if measure:
        return f"{told}: at depth {deepest.depth:g} it keeps {kept} of the experts' mean accuracy."
    return f"{told}: at depth {deepest.depth:g} it answers as its experts do in {kept} of the cases."


def build(*, only_hub: bool | None = None) -> gradio.Blocks:
    """The page. With `only_hub`, as on a Space, models are taken from the Hub alone.

    Raises ZipItError if gradio is not installed.
    """
    require("gradio")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio as gr

    only_hub = bool(os.environ.get("SPACE_ID")) if only_hub is None else only_hub
    house = tempfile.TemporaryDirectory(prefix="hf_zipit-app-")  # goes when the page does

    def check(first: str, second: str, samples: float) -> str:
        try:
            return examined(named(first, second, only_hub=only_hub), int(samples))
        except ZipItError as error:
            return not_possible(error)

    def merge(
        first: str, second: str, data: str, samples: float, depths: list[float], measure: bool,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - how gradio is asked for it
    ) -> tuple[object, ...]:  # fmt: skip
        try:
            experts = named(first, second, only_hub=only_hub)
            if only_hub and data.strip() != "sklearn-digits" and not is_repo(data.strip()):
                raise RecipeError(f"{data} is not a data set of the Hub; files can be named where you run this.")
            for old in sorted(Path(house.name).iterdir(), key=os.path.getmtime)[: -KEPT_ROOMS + 1]:
                shutil.rmtree(old, ignore_errors=True)
            room = Path(tempfile.mkdtemp(dir=house.name))
            found = merged(experts, data, int(samples), depths, measure, room, lambda what: progress(None, desc=what))
        except ZipItError as error:
            return not_possible(error), None, None, None
        table = gr.Dataframe(value=[list(row) for row in found.rows], headers=list(found.head), visible=True)
        return found.summary, table, found.picture and str(found.picture), str(found.archive)

    with gr.Blocks(title="hf_zipit", analytics_enabled=False) as page:
        gr.Markdown(f"# {TITLE}\n\n{ABOUT.format(folders='' if only_hub else ', or folders')}")
        with gr.Row():
            first = gr.Textbox(label="Model 1", placeholder="user/vit-clothes")
            second = gr.Textbox(label="Model 2", placeholder="user/vit-shoes")
        with gr.Row():
            data = gr.Textbox(label="Data", placeholder="a data set of the Hub with images or texts of both tasks")
            samples = gr.Slider(16, 1024, value=256, step=16, label="Samples of each task")
        with gr.Row():
            depths = gr.CheckboxGroup(list(DEPTHS), value=[1.0, 0.5], label="Depths (the deepest is kept)")
            measure = gr.Checkbox(False, label="Measure on the labels of the split test")
        with gr.Row():
            checking, merging = gr.Button("Check"), gr.Button("Merge", variant="primary")
        plan_text = gr.Markdown(elem_id="plan")
        summary = gr.Markdown(elem_id="summary")
        table = gr.Dataframe(visible=False, interactive=False, elem_id="table")
        picture = gr.Image(show_label=False, interactive=False, elem_id="picture")
        archive = gr.File(label="The merged model", interactive=False, elem_id="archive")
        checking.click(check, [first, second, samples], plan_text, api_name="check")
        inputs = [first, second, data, samples, depths, measure]
        merging.click(merge, inputs, [summary, table, picture, archive], api_name="merge", concurrency_limit=1)
    return page


def not_possible(error: ZipItError) -> str:
    return f"**This cannot be done.** {' '.join(str(error).split())}"


def launch(port: int | None = None, *, share: bool = False, block: bool = True) -> tuple[str, gradio.Blocks]:
    """Serve the page on this machine, by default until Ctrl-C; returns its address, and the page.

    Args:
        port: the first free one from 7860 by default.
        share: make a public link through Gradio's servers.
        block: return only when it ends.
    """
    page = build()
    import gradio as gr

    own = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # no fonts from elsewhere
    _, address, _ = page.launch(
        server_port=port, share=share, prevent_thread_lock=not block, theme=own, quiet=not block, show_error=True
    )
    return address, page
