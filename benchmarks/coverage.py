"""Which classes of transformers can be merged: every class of the Auto mappings, traced, proven, merged and loaded.

    python -m benchmarks.coverage --rows out/coverage.jsonl --out docs/coverage.md [--classes 300] [--only Mixtral]

Every class is tried in a process of its own, in its smallest form (`smallest.py`), with the example inputs that its
adapter makes. What is measured stands in `--rows`, one line a class with the commit of the tree (`--tree`). Classes
that are there are not tried again, unless `--renew` asks for those of some trees (a regular expression): the much
used families first, then what was proven but not free, then what was not traced. `--refit` measures of proven classes
that are there only what the refit solves.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import re
import subprocess
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

import hf_zipit
from benchmarks.other_modules import OTHERS, other
from benchmarks.smallest import smallest_model
from hf_zipit.adapters import adapter_for
from hf_zipit.adapters.auto import forward_names
from hf_zipit.errors import SpecError, ZipItError
from hf_zipit.files import write_text
from hf_zipit.refit import RefitReport
from hf_zipit.refit.walk import Walk
from hf_zipit.steady import forget, same_draws
from hf_zipit.symmetry import MergeSpec, prove
from hf_zipit.symmetry.group import apply_element, random_element
from hf_zipit.symmetry.proof import TOLERANCE, model_tensors, perturb
from hf_zipit.symmetry.rules.rotary import NUMBERED_PAIRS
from hf_zipit.symmetry.rules.shapes import EVERY_FEW
from hf_zipit.symmetry.spec import AxisLabel, factors, fitted
from hf_zipit.symmetry.trace import select_outputs

MAPPINGS = (
    "IMAGE_CLASSIFICATION", "SEQUENCE_CLASSIFICATION", "CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM",
    "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING", "AUDIO_CLASSIFICATION", "CTC", "SPEECH_SEQ_2_SEQ",
    "ZERO_SHOT_IMAGE_CLASSIFICATION", "IMAGE_TEXT_TO_TEXT", "OBJECT_DETECTION", "SEMANTIC_SEGMENTATION",
    "UNIVERSAL_SEGMENTATION", "DEPTH_ESTIMATION", "VIDEO_CLASSIFICATION", "TIME_SERIES_PREDICTION", "",
)  # fmt: skip
"""The Auto mappings that count; the empty name is that of the base models."""

MUCH_USED = """
    bert roberta distilbert albert electra deberta deberta-v2 xlm-roberta camembert mpnet modernbert bart mbart pegasus
    marian t5 mt5 umt5 longformer led big_bird gpt2 gpt_neo gpt_neox gptj opt bloom falcon mpt llama mistral mixtral
    qwen2 qwen3 qwen2_moe qwen3_moe gemma gemma2 gemma3_text phi phi3 olmo2 cohere stablelm starcoder2 granite mamba
    deepseek_v3 glm gpt_oss vit deit beit swin swinv2 convnext convnextv2 dinov2 dinov3_vit resnet regnet mobilenet_v2
    efficientnet mobilevit segformer detr yolos mask2former dpt clip siglip blip llava qwen2_vl whisper wav2vec2 hubert
    wavlm audio-spectrogram-transformer videomae
"""
"""Families that many people use, by our judgement."""

MODULE = "module"
"""Stands for an Auto mapping where a model is no class of transformers (`other_modules.py`)."""

SECONDS = 150
"""A class that takes longer is given up."""

SAMPLES = 24
SAME = 1e-4
"""A reordered copy that comes back is off by less than this."""

SOLVED = 0.99
"""The refit takes a class as a whole when it solves this share of its trunk's parameters."""

KEPT = 3
"""So many of the tensors that the refit keeps are named."""

FREE = 0.95
"""A class is free when this share of its attention and MLP matrices is."""

ATTENTION = re.compile(
    r"att(n|ention)|(^|[._])(q|k|v|o|qkv|query|key|value|queries|keys|values)(_?(proj|lin))?([._]|$)|mixer|mamba|ssm"
)
BESIDE = re.compile(
    r"embed|position|relative|rel_(pos|attn)|bias_table|attention_biases|(^|\.)(norm|ln)|router|gate\.weight|rotary"
)
"""Tensors in blocks that are neither attention nor MLP."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass
class Row:
    """What was found of one class; fields that were not reached are None."""

    name: str
    family: str
    mapping: str
    parameters: int | None = None
    proof: float | None = None
    attention: float | None = None
    mlp: float | None = None
    frozen: dict[str, int] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    weights: float | None = None
    permute: float | None = None
    loaded: bool | None = None
    seconds: float = 0.0
    stage: str = "built"
    error: str | None = None
    tree: str = ""
    solved: float | None = None
    kept: list[str] = field(default_factory=list)
    not_refit: str | None = None
    refit_tree: str = ""

    @property
    def proven(self) -> bool:
        return self.proof is not None and self.proof <= TOLERANCE

    @property
    def back(self) -> bool | None:
        """Whether a reordered copy comes back by both methods, None where that was not tried."""
        errors = [error for error in (self.weights, self.permute) if error is not None]
        return max(errors) <= SAME if errors else None

    @property
    def free(self) -> bool:
        shares = [share for share in (self.attention, self.mlp) if share is not None]
        return self.proven and bool(shares) and min(shares) >= FREE


# One class -----------------------------------------------------------------------------------------------------------


def measure(row: Row, merging: bool = True, refitting: bool = True) -> Iterator[Row]:
    """The row of a class, again after every stage."""
    if row.mapping == MODULE:
        model, inputs = other(row.family, row.name)
    else:
        model, inputs = smallest_model(getattr(transformers, row.name)), None
    row.parameters, row.stage = sum(p.numel() for p in model.parameters()), "traced"
    yield row
    spec = MergeSpec.from_model(model, inputs)
    row.unknown = list(spec.unknown_ops)
    row.stage = "proven"
    yield row
    row.proof = max(prove(model, spec, seed=seed, inputs=inputs) for seed in range(2))
    row.attention, row.mlp, row.frozen = shares(spec, model)
    row.stage = "merged"
    yield row
    if merging:
        yield from merged(row, model, spec) if inputs is None else merged_module(row, model, spec, inputs)
    if refitting and inputs is None:
        yield from refitted(row)
    row.stage = "done"
    yield row


def refitted(row: Row) -> Iterator[Row]:
    """The row with what the refit solves of the trunk of two random models, or why it takes none of them."""
    row.stage, row.refit_tree = "refitted", row.refit_tree or row.tree
    row.solved, row.kept, row.not_refit = None, [], None
    yield row
    try:
        found = solved(row.name)
    except ZipItError as error:
        row.not_refit = " ".join(str(error).split())
    else:
        row.solved, row.kept = found.share, found.kept
    row.stage = "done"
    yield row


@dataclass(frozen=True)
class Solved:
    """The share of the trunk's parameters that the refit solves, the largest tensors that it keeps, and what it found.

    Of `whole` layers of attention the logits and the values are solved as a whole, of others the values alone;
    experts' heads may stay heads of their own (`own_heads`: split, or chosen), and units may be `chosen`.
    """

    share: float
    kept: list[str]
    whole: int
    values: int
    own_heads: int
    chosen: int


def solved(name: str) -> Solved:
    """What the refit solves of a class in its smallest form.

    Raises:
        ZipItError: the class cannot be refitted.
    """
    experts = {task: in_general_position(name, seed) for seed, task in enumerate("ab")}
    data = samples(experts["a"])
    for expert in experts.values():
        through_norms(expert, data)
    walks: list[Walk] = []
    run = Walk.run
    try:
        Walk.run = lambda self: walks.append(self) or run(self)  # type: ignore[method-assign,assignment,func-returns-value]
        result = hf_zipit.merge(experts, data, method="permute", refit=True, corrections={})
    finally:
        Walk.run = run  # type: ignore[method-assign]
    if not walks:
        raise SpecError(f"{name} has no trunk")
    (walk,) = walks
    worst(result, experts, data)  # it answers
    sizes = {key: p.numel() for key, p in experts["a"].named_parameters() if key in walk.cut.trunk}
    left = {*RefitReport.of(result).untouched, *(sizes.keys() - walk.fit.spec.axes.keys())}  # type: ignore[union-attr]
    kept = sorted(left & sizes.keys(), key=lambda key: -sizes[key])
    layers = list(walk.attention.values())
    whole = sum(layer.logits is not None for layer in layers)
    share = 1 - sum(sizes[key] for key in kept) / sum(sizes.values())
    own = len(walk.splits) + sum(layer.apart is not None and layer.apart.exchanged for layer in layers)
    return Solved(share, kept[:KEPT], whole, len(layers) - whole, own, len(walk.mlps))


def in_general_position(name: str, seed: int) -> PreTrainedModel:
    """A small model of a class with random weights; what no file holds stays what the configuration makes it."""
    model = smallest_model(getattr(transformers, name))
    moved = perturb(model_tensors(model), torch.Generator().manual_seed(seed))
    return with_tensors(model, {**model_tensors(model), **{key: moved[key] for key in model.state_dict()}})


def shares(spec: MergeSpec, model: nn.Module) -> tuple[float | None, float | None, dict[str, int]]:
    """The shares of the attention and of the MLP matrices in blocks that are free, and what fixes the others.

    A matrix is free where every factor of both of its axes moves: of a convolution's kernel, of its channels. What
    counts the parts of a fused matrix (`x[..., ::2]` is its gate, `x[..., 1::2]` what is gated) is no unit.
    """
    free: dict[bool, list[bool]] = {True: [], False: []}
    reasons: Counter[str] = Counter()
    for name, tensor in model.named_parameters():
        module = name.rpartition(".")[0]
        inside = any(module.startswith(f"{block.path}.") for block in spec.blocks)
        if not inside or tensor.ndim < 2 or name not in spec.axes or BESIDE.search(name):
            continue
        convolution = tensor.ndim > 2 and isinstance(model.get_submodule(module), CONVOLUTIONS)
        axes = spec.axes[name][:2] if convolution else spec.axes[name]
        fixed = set().union(*(fixed_units(spec, label) for label in axes))
        free[bool(ATTENTION.search(name))].append(not fixed)
        reasons.update({spec.spaces[space].frozen_by or "?" for space in fixed})
    attention, mlp = (sum(found) / len(found) if found else None for found in (free[True], free[False]))
    return attention, mlp, dict(reasons.most_common(3))


def fixed_units(spec: MergeSpec, label: AxisLabel) -> set[str]:
    """The spaces of an axis that do not move, but for what counts its parts where the units of these do."""
    fixed = {f.space for f in factors(label) if not spec.movable(f.space)}
    parts = {name for name in fixed if spec.spaces[name].frozen_by in (EVERY_FEW, NUMBERED_PAIRS)}
    return fixed - parts if parts and any(spec.movable(f.space) for f in factors(label)) else fixed


def merged(row: Row, model: PreTrainedModel, spec: MergeSpec) -> Iterator[Row]:
    """Merge a model with a reordered copy of itself by two methods, save the result and load it."""
    generator = torch.Generator().manual_seed(1)
    saved = perturb(model.state_dict(), generator)  # what is not saved is computed anew
    model = with_tensors(model, {**model_tensors(model), **saved})
    inputs = samples(model)
    through_norms(model, inputs)
    moved = apply_element(model_tensors(model), spec, random_element(spec, generator, permutations_only=True))
    experts = {"a": model, "b": with_tensors(model, moved)}
    result = hf_zipit.merge(experts, method="weights", refit=None, corrections={})
    row.weights, row.stage = worst(result, experts, inputs), "loaded"
    yield row
    with tempfile.TemporaryDirectory() as folder:
        result.save_pretrained(folder)
        autos = [name for name in result.config.auto_map if name != "AutoConfig"]
        again = getattr(transformers, autos[-1]).from_pretrained(folder)  # of several the one of its task
        row.loaded = worst(again, experts, inputs) <= SAME
    row.stage = "merged by permute"
    yield row
    result = hf_zipit.merge(experts, inputs, method="permute", refit=None, corrections={})
    row.permute = worst(result, experts, inputs)


@torch.no_grad()
def merged_module(row: Row, model: nn.Module, spec: MergeSpec, inputs: Mapping[str, Tensor]) -> Iterator[Row]:
    """The same of a model that is told its example inputs; one that is no Hugging Face model is not saved."""
    generator = torch.Generator().manual_seed(1)
    model = with_tensors(model, {**model_tensors(model), **perturb(model.state_dict(), generator)})
    data = {name: x.repeat(SAMPLES // len(x), *[1] * (x.ndim - 1)) for name, x in inputs.items()}
    data = {n: torch.randn(x.shape, generator=generator) if x.is_floating_point() else x for n, x in data.items()}
    through_norms(model, data)
    moved = apply_element(model_tensors(model), spec, random_element(spec, generator, permutations_only=True))
    experts = {"a": model, "b": with_tensors(model, moved)}
    expected = select_outputs(model(**data), None)
    for method in ("weights", "permute"):
        given = None if method == "weights" else data
        settings: dict[str, Any] = {"method": method, "refit": None, "corrections": {}, "example_inputs": inputs}
        result = hf_zipit.merge(experts, given, **settings)
        task = {"task": "b"} if isinstance(result, PreTrainedModel) else {}
        found = select_outputs(result(**data, **task), None)
        setattr(row, method, max(relative_error(found[name], x) for name, x in expected.items()))
        row.stage = "merged by permute"
        yield row


def with_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> Any:
    """A copy of a model with other tensors."""
    made = copy.deepcopy(model).eval()
    with torch.no_grad():
        for name, tensor in model_tensors(made).items():
            tensor.copy_(tensors[name])
    forget(made)
    return made


@torch.no_grad()
def through_norms(model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    """Have the statistics of BatchNorms be the inputs': with others a deep random network computes a constant."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the average of all batches, which is one
        norm.train()
    if norms:
        model(**fitted(inputs, model))
    for norm in norms:
        norm.eval()


def samples(model: PreTrainedModel) -> dict[str, Tensor]:
    """More of the adapter's example inputs, drawn at random where they are."""
    generator = torch.Generator().manual_seed(3)
    inputs: dict[str, Tensor] = {}
    examples = adapter_for(model).inputs(model)
    named = {"image_token_id", "image_token_index"} & {*vars(model.config)}
    for name, example in examples.items():
        if not isinstance(example, Tensor):
            continue
        shape = (SAMPLES, *example.shape[1:])
        few = example.unique()
        if example.is_floating_point() and len(few) > 1:
            inputs[name] = torch.randn(shape, generator=generator)
        elif name.endswith("input_ids") and "pixel_values" in examples and named:
            inputs[name] = example[:1].expand(shape)  # its image tokens have to stay
        elif name.endswith("input_ids"):
            ends = example[:1, -1:]  # where every text has one end, it stays the only one
            ended = bool((example == ends).sum(1).eq(1).all())
            few = few[few != ends.item()] if ended and len(few) > 1 else few
            drawn = few[torch.randint(len(few), shape, generator=generator)]
            inputs[name] = torch.cat([drawn[:, :-1], ends.expand(SAMPLES, 1)], 1) if ended else drawn
        else:
            inputs[name] = example[:1].expand(shape)
    return inputs


@torch.no_grad()
def worst(result: nn.Module, experts: Mapping[str, PreTrainedModel], inputs: Mapping[str, Tensor]) -> float:
    """The largest relative difference of a merged model's outputs from its experts'."""
    errors = [0.0]
    few: dict[str, Any] = {name: tensor[:4] for name, tensor in inputs.items()}
    for task, expert in experts.items():
        if "use_cache" in forward_names(expert):
            few["use_cache"] = False  # states of past tokens are of no use here, as in a merge
        fields = adapter_for(expert).outputs(expert)
        with same_draws():
            expected = select_outputs(expert(**fitted(few, expert)), fields)
        with same_draws():
            found = select_outputs(result(**fitted(few, expert), task=task), fields)
        for name, tensor in expected.items():
            if not tensor.is_floating_point():
                continue
            errors.append(relative_error(found[name], tensor))
    return max(errors)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest number."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


# All classes ---------------------------------------------------------------------------------------------------------


def classes() -> list[tuple[str, str, str]]:
    """Class, family and Auto mapping of all that counts: of every family one class, then of every one another."""
    turns: dict[str, list[tuple[str, str, str]]] = {}
    seen: set[str] = set()
    for mapping in MAPPINGS:
        name = f"MODEL_FOR_{mapping}_MAPPING_NAMES" if mapping else "MODEL_MAPPING_NAMES"
        for family, own in getattr(modeling_auto, name).items():
            for one in [own] if isinstance(own, str) else own:
                if one not in seen and hasattr(transformers, one):
                    seen.add(one)
                    turns.setdefault(family, []).append((one, family, mapping.lower() or "base"))
    rounds = max(map(len, turns.values()))
    return [own[i] for i in range(rounds) for own in turns.values() if i < len(own)]


def by_value(found: list[tuple[str, str, str]], known: Mapping[str, Row]) -> list[tuple[str, str, str]]:
    """Classes in the order in which another measurement tells most, after what is known of them."""
    much_used = set(MUCH_USED.split())

    def place(one: tuple[str, str, str]) -> int:
        row = known.get(one[0])
        if one[1] in much_used:
            return 0
        if row is None:
            return 4
        return 1 if row.proven and not row.free else 2 if row.stage == "traced" else 3

    return sorted(found, key=place)


def commit() -> str:
    """The commit of this tree, empty outside of git."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return found.stdout.strip()


def apart(row: Row, work: Callable[[Row], Iterator[Row]]) -> Row:
    """The row of a class that is tried in a process of its own."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=_work, args=(row, there, work))
    start = time.perf_counter()
    process.start()
    there.close()
    ended = "the process died"
    try:
        while True:
            left = SECONDS - (time.perf_counter() - start)
            if not here.poll(max(left, 0)):
                ended = f"given up after {SECONDS} s"
                break
            row = here.recv()
            if row.error or row.stage == "done":
                ended = row.error or ""
                break
    except EOFError:
        pass
    process.kill()
    process.join()
    row.error, row.seconds = ended or None, round(time.perf_counter() - start, 1)
    return row


def _work(row: Row, connection: Connection, work: Callable[[Row], Iterator[Row]]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        for state in work(row):
            connection.send(state)
    except Exception as error:
        row.error = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        connection.send(row)


# The page ------------------------------------------------------------------------------------------------------------


def page(rows: list[Row], command: str, note: str = "") -> str:
    """The whole page in Markdown; `note` says what else is to know of the rows."""
    others = [row for row in rows if row.mapping == MODULE]
    rows = [row for row in rows if row.mapping != MODULE]
    built = [row for row in rows if row.stage != "built"]
    partly = [row for row in built if row.solved is not None and row.solved < SOLVED]
    refused = [row for row in built if row.not_refit]
    counts = {
        "classes tried": rows,
        "built in a small size": built,
        "traced and proven at 1e-5": [row for row in built if row.proven],
        "with 95 % of attention and MLP matrices free": [row for row in built if row.free],
        "merged with a reordered copy of themselves": [r for r in built if r.weights is not None],
        "the copy comes back by `weights`": [r for r in built if r.weights is not None and r.weights <= SAME],
        "the copy comes back by `permute`": [r for r in built if r.permute is not None and r.permute <= SAME],
        "saved and loaded by Auto": [row for row in built if row.loaded],
        "traced, but not proven": [r for r in built if r.proof is not None and not r.proven],
        "given to the refit": [row for row in built if row.refit_tree],
        f"of which it solves {percent(SOLVED)} of the trunk or more": [
            row for row in built if (row.solved or 0) >= SOLVED
        ],
        "of which it solves less": partly,
        "which it does not take": refused,
    }
    summary = "\n".join(f"| {name} | {len(own)} |" for name, own in counts.items())
    causes: Counter[str] = Counter()
    for row in built:
        causes.update(row.frozen.keys())
    fixing = "\n".join(f"| {cause} | {count} |" for cause, count in causes.most_common(15))
    trees = Counter(row.tree for row in rows).most_common()
    by_tree = ", ".join(f"{count} of {tree or 'an unknown one'}" for tree, count in trees)
    columns = "class | family | tree | proof | attention | MLP | `weights` | `permute` | loaded | solved | s"
    head = f"| {columns} | what is fixed, or what went wrong |"
    lines = [head, "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: | --- |"]
    lines += [line(row) for row in sorted(built, key=lambda row: (row.family, row.name))]
    lost = [row for row in built if row.proven and not (row.back and row.permute is not None)]
    solved_at = Counter(row.refit_tree for row in rows if row.refit_tree).most_common()
    by_refit_tree = ", ".join(f"{count} at {tree}" for tree, count in solved_at) or "nowhere yet"
    unsolved = "\n".join(map(refit_line, sorted([*partly, *refused], key=lambda row: row.name)))
    unbuilt = sorted((row for row in rows if row.stage == "built"), key=lambda row: row.name)
    missing = "\n".join(f"| {row.name} | {told(row.error)} |" for row in unbuilt)
    return f"""# Coverage

Written by `{command}`; not edited by hand.

Classes of the Auto mappings in their smallest form, with random weights and example inputs: one class of every family,
then more. *proof* is the largest relative error of the outputs after a random element of the inferred group
([Symmetries](symmetries.md)); *attention* and *MLP* are the shares of the matrices in blocks of which every factor of
both axes can move; `weights` and `permute` the relative error of a merge with a reordered copy by that method, without
a refit; *solved* the share of the trunk's parameters that the [refit](refit.md) solves where two random models are
merged; `-` where that was not measured. torch {torch.__version__}, transformers {transformers.__version__}, CPU.

*tree* is the commit that a row was measured at: {by_tree}.{f" {note}" if note else ""} *solved* was measured
{by_refit_tree}.

| | classes |
| --- | ---: |
{summary}

## What fixes attention and MLP matrices

| cause | classes |
| --- | ---: |
{fixing}

## What the refit leaves

Proven classes of which the refit solves less than {percent(SOLVED)}, and which tensors keep their combined values, the
largest ones first (nothing of the example inputs reaches some of them); or why it does not take the class.

| class | solved | kept, or why not |
| --- | ---: | --- |
{unsolved}

## Proven, but not brought back

{chr(10).join([head, *lines[1:2], *map(line, sorted(lost, key=lambda row: row.name))]) if lost else "None."}

## {len(MUCH_USED.split())} families that are much used

The best class of each: whether it is proven, whether 95 % of its attention and MLP matrices are free, and whether a
reordered copy comes back (empty where no merge was measured).

| family | class | proven | free | comes back | what went wrong |
| --- | --- | --- | --- | --- | --- |
{chr(10).join(best(family, built) for family in MUCH_USED.split())}

## Classes

{chr(10).join(lines)}

## Other models

Plain `torch.nn` modules and models of other packages, merged with `example_inputs`, none of them saved.

{chr(10).join([*lines[:2], *map(line, others)])}

## Not built

No small configuration is known for these.

| class | why |
| --- | --- |
{missing}
"""


def best(family: str, rows: list[Row]) -> str:
    """A family's row of the table: of its class that is free, else proven, else of any."""
    own = sorted(
        (row for row in rows if row.family == family), key=lambda row: (row.free, row.proven, row.back or False)
    )
    if not own:
        return f"| {family} | - | - | - | - | not built |"
    row = own[-1]
    answers = {True: "yes", False: "no", None: ""}
    wrong = "" if row.free else told(row.error) or "; ".join(row.frozen)
    return f"| {family} | {row.name} | {answers[row.proven]} | {answers[row.free]} | {answers[row.back]} | {wrong} |"


def line(row: Row) -> str:
    """A class's row of the table."""
    fixed = "; ".join(row.frozen)
    told_apart = "; ".join(filter(None, (f"{row.stage}: {told(row.error)}" if row.error else "", fixed)))
    loaded = {True: "yes", False: "no", None: "-"}[row.loaded]
    cells = [
        row.name, row.family, row.tree, number(row.proof), percent(row.attention), percent(row.mlp),
        number(row.weights), number(row.permute), loaded, "no" if row.not_refit else percent(row.solved, 1),
        f"{row.seconds:.0f}", told_apart,
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def refit_line(row: Row) -> str:
    """A class's row of the table of what the refit leaves."""
    why = f"not refit: {told(row.not_refit)}" if row.not_refit else ", ".join(row.kept)
    return f"| {row.name} | {percent(row.solved, 1)} | {why} |"


def told(error: str | None) -> str:
    """An error for a cell of a table, without paths of this machine."""
    text = re.sub(r"/[\w./-]+/", ".../", error or "").replace("|", "/").replace("<", "&lt;").replace("[", "&#91;")
    return text if len(text) <= 200 else f"{text[:200]} ..."


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0e}"


def percent(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def read(path: Path) -> list[Row]:
    """The rows of a file, the last one of every class."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = {row["name"]: Row(**row) for row in map(json.loads, lines)}
    return list(rows.values())


def main(
    rows: Annotated[Path, typer.Option(help="The file of what is measured.")] = Path("out/coverage.jsonl"),
    out: Annotated[Path | None, typer.Option(help="The Markdown file to write.")] = None,
    count: Annotated[int | None, typer.Option("--classes", help="Try the first so many classes.")] = None,
    only: Annotated[str | None, typer.Option(help="Try (again) the classes whose name contains this.")] = None,
    renew: Annotated[str | None, typer.Option(help="Try the classes again whose row's tree matches this.")] = None,
    tree: Annotated[str | None, typer.Option(help="What the rows say of this tree, by default its commit.")] = None,
    note: Annotated[str, typer.Option(help="What else the page says of how its rows were measured.")] = "",
    merging: Annotated[bool, typer.Option(help="Merge and refit, not only trace and prove.")] = True,
    refit: Annotated[bool, typer.Option(help="Measure only what the refit solves, of proven classes.")] = False,
) -> None:
    """Try classes and write the page."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    tree = commit() if tree is None else tree
    known = {row.name: row for row in read(rows)}
    rows.parent.mkdir(parents=True, exist_ok=True)
    modules = [(name, package, MODULE) for package, own in OTHERS.items() for name in own]
    for name, family, mapping in [*by_value(classes()[:count], known), *modules]:
        old = known.get(name)
        if refit and (old is None or not old.proven or mapping == MODULE):
            continue
        at = None if old is None else (old.refit_tree or None) if refit else old.tree
        again = at is None or (renew is not None and re.fullmatch(renew, at))
        if not again if only is None else not re.search(only, name):
            continue
        if refit and old is not None:
            row = replace(apart(replace(old, refit_tree=tree, error=None), refitted), seconds=old.seconds)
        else:
            row = apart(Row(name, family, mapping, tree=tree), partial(measure, merging=merging, refitting=merging))
        with rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        typer.echo(line(row))
    if out is not None:
        write_text(out, page(read(rows), "make coverage", note))


if __name__ == "__main__":
    typer.run(main)
