"""The settings of a merge: everything that decides its result, in one place.

A `MergeConfig` is built once, from keywords, a recipe, the command line or a saved model, and checked against the
registries when it is built. Every stage reads it from the plan. A new setting is one field here.

How a merge is run (devices, progress bars, what is observed already) decides nothing and is not in here.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from hf_zipit.errors import RecipeError
from hf_zipit.files import write_json
from hf_zipit.files.places import folder_of
from hf_zipit.registry import CORRECTIONS, METHODS, RESIDUES, ROUTERS, RULES, TRAININGS, check_options, suggestion
from hf_zipit.schema import brief, build, convert

AUTO = "auto"
"""Chosen when the experts are known: see `hf_zipit.planning.auto`."""

REFIT = "+refit"
"""The end of a method's name, in recipes and tables, where the refit comes after it."""

Section = TypeVar("Section")

Residual = Literal["match", "identity", "orthogonal"]

SEEDS = 2**32
"""So many seeds there are: numpy takes no negative ones and, where Optuna draws, no larger ones."""

FILE = "merge_config.json"

Named = str | Mapping[str, Mapping[str, Any] | None] | Sequence[Any]
"""One name or several, with options: `"repair"`, `("a", "b")`, `{"a": {"x": 1}}` or `[{"a": {"x": 1}}, "b"]`."""


def checked(settings: type[Section]) -> type[Section]:
    """Decorator of a dataclass: what it does not take is a RecipeError, which names the closest keyword."""
    known, init = [f.name for f in fields(settings)], settings.__init__  # type: ignore[arg-type]

    @functools.wraps(init)
    def told(self: Any, *unnamed: Any, **given: Any) -> None:
        if unnamed:
            raise RecipeError(
                f"Settings of a {settings.__name__} are given by name, as {known[0]}={brief(unnamed[0])}."
            )
        check_known(given, known)
        init(self, **given)

    settings.__init__ = told  # type: ignore[misc]
    return settings


def check_known(given: Iterable[str], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            raise RecipeError(f"There is no setting {name!r} of a merge; {suggestion(name, known)}")


def set_typed(settings: Any, where: str) -> None:
    """Have every field be of its type; raises RecipeError for a value that cannot be."""
    hints = get_type_hints(type(settings))
    for f in fields(settings):
        value = convert(hints[f.name], getattr(settings, f.name), f"{where}'s {f.name}")
        object.__setattr__(settings, f.name, value)


OWN = 11 / 9
"""How often a sample's own expert counts in the refit's targets, where each of the others counts once."""


RIDGE, MANY, STRONGEST = 1e-4, 512, 3e-2
"""The ridge of regressions on so many samples a task, and the largest one, of few."""


@checked
@dataclass(frozen=True, kw_only=True)
class RefitConfig:
    """How modules are regressed on the experts' features; `benchmarks/` chose the defaults on validation data.

    Attributes:
        own_task_weight: w, the weight of a task's own expert in the target on that task's samples; the others share
            1 - w. From 1/T (all experts on all samples, for experts that are useful on each other's data) to 1. None,
            the default: `OWN` times what each of the others has, 0.55 of two experts and 0.15 of eight.
        readout_weight: how often the positions that the head reads (a class token, masked tokens) count.
        ridge: lambda, the penalty on the distance to the combined weights, relative to the mean of the Gram matrix's
            diagonal. None, the default: 1e-4 for 512 given samples a task or more, (512 / n)^2.5 times that for n,
            which is 1.8e-2 for 64, and at most 3e-2.
        rows_per_input: about this many rows (tokens, positions) per input unit enter a Gram matrix; 0 for all.
        split_heads: let every expert's attention heads stay heads of their own, each with 1/T of the width, in layers
            where that is nearer to the experts than pairing them; the model stays as large and as fast.
        choose_units: let experts' units stay units of their own in MLPs, of all experts' those that explain most,
            where that is nearer to the experts than pairing them; the model stays as large and as fast.
        attention_steps: fit attention layers to what the stream lacks through their softmax, by at most so many steps
            of Adam; 0 leaves them as they were solved.
        unit_steps: fit the units of MLPs to what the stream lacks through their nonlinearity, by at most so many steps
            of Adam; 0 leaves them as they were solved.
        shared_steps: fit layers that run again and again, such as ALBERT's one, through all rounds, by at most so many
            steps of Adam; 0 leaves them as they were solved.
        answer_steps: fit the last layer and the maps out of the trunk to what the experts answer to samples of their
            own tasks, by at most so many steps of Adam; 0 leaves them as they were solved.
        written_samples: where a task has fewer samples than this, there are further ones, up to this number, and of
            short texts as many as hold 65,536 tokens, up to four times this number. Its expert writes them (a causal
            language model or an encoder-decoder), or they are spliced of the given ones (other texts, recordings);
            see `hf_zipit.data.written`. 0 for none.
        stream_bases: choose the basis of residual streams by what the experts compute there, where rotations of a
            stream are allowed, or would be but for the scales of post-LN norms.
        micro_batch: samples that go through a module at once.
        memory_gb: activations beyond this go to temporary files; None, the default: beyond what the `Calibration`'s
            `memory_gb` leaves.
        joint_heads: make the tasks' logits comparable: every head's logits are raised on samples of its own task and
            lowered on the others', all by the same amount, so that the order within a task stays as it is.
    """

    own_task_weight: float | None = None
    readout_weight: float = 30.0
    ridge: float | None = None
    rows_per_input: int = 32
    split_heads: bool = True
    choose_units: bool = True
    attention_steps: int = 32
    unit_steps: int = 128
    shared_steps: int = 256
    answer_steps: int = 128
    written_samples: int = 512
    stream_bases: bool = True
    micro_batch: int = 64
    memory_gb: float | None = None
    joint_heads: bool = False

    def __post_init__(self) -> None:
        set_typed(self, "refit")
        if self.own_task_weight is not None and not 0 < self.own_task_weight <= 1:
            raise RecipeError(f"refit's own_task_weight is {self.own_task_weight}; it must be above 0 and at most 1")
        for name in ("readout_weight", "ridge", "memory_gb"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise RecipeError(f"refit's {name} is {value}; it must be above 0")
        if self.micro_batch < 1:
            raise RecipeError(f"refit's micro_batch is {self.micro_batch}; it must be at least 1")
        for name in (
            "rows_per_input",
            "attention_steps",
            "unit_steps",
            "shared_steps",
            "answer_steps",
            "written_samples",
        ):
            if getattr(self, name) < 0:
                raise RecipeError(f"refit's {name} is {getattr(self, name)}; it must be at least 0")

    def for_samples(self, count: float) -> RefitConfig:
        """The settings for so many given samples a task, with their ridge."""
        if self.ridge is not None:
            return self
        return replace(self, ridge=min(RIDGE * max(MANY / max(count, 1.0), 1.0) ** 2.5, STRONGEST))

    def shares(self, task: int | None, experts: int) -> list[float]:
        """How much each expert counts in the target of samples of a task, or of an unknown one; they sum to one."""
        if task is None:
            return [1 / experts] * experts
        own = OWN / (OWN + experts - 1) if self.own_task_weight is None else self.own_task_weight
        # Never quite zero: units that only other experts have are to be what they are there, on these samples too.
        others = max((1 - own) / (experts - 1), 1e-9)
        return [own if t == task else others for t in range(experts)]


@checked
@dataclass(frozen=True, kw_only=True)
class PolishConfig:
    """How a merged model is trained on what its experts compute, if it is; see `docs/polish.md` for the defaults.

    Attributes:
        kind: what is trained, one of `hf_zipit.polish.kinds`: all `"weights"`, by default, or less.
        options: the kind's own options.
        steps: at most.
        batch_size: samples of every task in a step.
        learning_rate: the peak of AdamW's rate; it rises over the share `warmup` of the steps and falls as a cosine.
        weight_decay: of AdamW.
        max_grad_norm: longer gradients are made this long.
        feature_weight: of the features that the tasks' own modules read, against 1 for what the model puts out.
        readout_weight: how often the positions that the head reads (a class token, masked tokens) count.
        heads: train the tasks' readout maps and heads as well, instead of the shared trunk alone.
        held_out: the share of every task's samples that are not learnt from, but decide which weights are kept.
        evaluate_every: so many steps lie between two measurements on them.
        patience: stop after this many measurements that are no better than the best; 0 for never.
        checkpoint: a folder to keep the state in and to go on from; what comes out is the same with and without.
    """

    kind: str = "weights"
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 600
    batch_size: int = 16
    learning_rate: float = 1e-3
    warmup: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    feature_weight: float = 1.0
    readout_weight: float = 10.0
    heads: bool = True
    held_out: float = 0.125
    evaluate_every: int = 50
    patience: int = 6
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        set_typed(self, "polish")
        object.__setattr__(
            self, "options", check_options(self.kind, TRAININGS.get(self.kind).function, self.options or {})
        )
        for name in ("steps", "batch_size", "evaluate_every"):
            if getattr(self, name) < 1:
                raise RecipeError(f"polish's {name} is {getattr(self, name)}; it must be at least 1")
        for name in ("learning_rate", "max_grad_norm", "readout_weight"):
            if not getattr(self, name) > 0:
                raise RecipeError(f"polish's {name} is {getattr(self, name)}; it must be above 0")
        for name in ("weight_decay", "feature_weight", "patience"):
            if not getattr(self, name) >= 0:
                raise RecipeError(f"polish's {name} is {getattr(self, name)}; it must be at least 0")
        if not 0 <= self.warmup < 1 or not 0 < self.held_out < 1:
            raise RecipeError(
                f"polish's warmup is {self.warmup} and its held_out {self.held_out}; they must be shares below 1, and "
                "something must be held out"
            )


@checked
@dataclass(frozen=True, kw_only=True)
class RootConfig:
    """How experts are trained from the weights of one of them before they are combined, if they are.

    Attributes:
        anchor: the task whose expert the others start from; the first by default.
        steps, batch_size, learning_rate, feature_weight, held_out, evaluate_every, patience: as of a `PolishConfig`.
    """

    anchor: str | None = None
    steps: int = PolishConfig.steps
    batch_size: int = PolishConfig.batch_size
    learning_rate: float = PolishConfig.learning_rate
    feature_weight: float = PolishConfig.feature_weight
    held_out: float = PolishConfig.held_out
    evaluate_every: int = PolishConfig.evaluate_every
    patience: int = PolishConfig.patience

    def __post_init__(self) -> None:
        set_typed(self, "root")
        _ = self.training

    @property
    def training(self) -> PolishConfig:
        """The training of every expert."""
        own = {name: value for name, value in asdict(self).items() if name != "anchor"}
        try:
            return PolishConfig(**own)
        except RecipeError as error:
            raise RecipeError(str(error).replace("polish's", "root's")) from None


@checked
@dataclass(frozen=True, kw_only=True)
class ResidueConfig:
    """What is kept, task by task, of what the tasks' own weights are more than the merged ones.

    Attributes:
        kind: how matrices are kept, one of `hf_zipit.modeling.kinds`: by `"signs"`, 1 bit a weight, as often as it
            pays, by `"low-rank"` factors, or by a mask and more, `"tall"`, `"emr"`, `"t-switch"`.
        size: of `"signs"` and `"low-rank"`: the merged model's size with them, in bytes, as a multiple of its size
            without; above 1, 1.1 by default. The other kinds are as large as they are.
        options: the kind's own, such as `{"threshold": 0.4}`.
        router: what is done where no task is named, one of `hf_zipit.residues.routers`: with True or `"discriminant"`
            `task="auto"` finds the task of every sample, for which calibration data must come by task; with `"smile"`
            every token gets the residues of the tasks that it is of, layer by layer. False or None: neither.
        router_options: the router's own, such as `{"rank": 8}`.

    Raises:
        RecipeError: a setting is unknown or out of range.
    """

    kind: str = "signs"
    size: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    router: str | bool | None = None
    router_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kind = RESIDUES.get(self.kind)
        options = check_options(self.kind, kind.pack, self.options or {})
        if options:
            kind.pack((), **options)
        object.__setattr__(self, "options", options)
        router = "discriminant" if self.router is True else self.router or None
        object.__setattr__(self, "router", router)
        if router is None and self.router_options:
            raise RecipeError(f"router_options {sorted(self.router_options)} are a router's own; name the router.")
        if router is not None:
            found = check_options(router, ROUTERS.get(router).function, self.router_options or {})
            object.__setattr__(self, "router_options", found)
        if not kind.stepwise and self.size is not None:
            raise RecipeError(
                f"residues of kind {self.kind!r} are as large as their masks; leave size={self.size} out, or choose a "
                "kind that is kept more or less of, such as 'signs'"
            )
        if kind.stepwise and self.size is None:
            object.__setattr__(self, "size", 1.1)
        if self.size is not None and not self.size > 1:
            raise RecipeError(f"residues' size is {self.size}; it is a multiple of the merged model's own, above 1")

    @property
    def needs_origin(self) -> bool:
        """Whether something of them is of task vectors: a base is then taken whatever the rule."""
        routed = self.router is not None and ROUTERS.get(self.router).needs_origin
        return RESIDUES.get(self.kind).needs_origin or routed


@checked
@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """How experts are merged.

    Attributes:
        method: how units are matched, one of `hf_zipit.align.methods`; `"identity"` is plain averaging, `"auto"` the
            best that is known for what is given: see `hf_zipit.planning.auto`.
        options: the method's own options, such as `{"alpha": 0.3}`.
        depth: the share of blocks that is merged, or the path of the block before which the trunk ends. 1 leaves only
            the task heads apart, 0 keeps the experts side by side.
        size: in place of a depth: the merged model has at most so many times the parameters of one expert, as many
            blocks at the end being left to every task as that allows. None: the depth says.
        residual: what happens to the residual stream: `"match"` it like the rest, leave it at `"identity"`, or rotate
            it by the best `"orthogonal"` map, for which the norms are folded into their readers; where a model's norms
            cannot be folded (BERT, ResNet) it is matched.
        overrides: another method for spaces whose name fits a pattern, `{"*.mlp.*": "permute"}`; the first pattern
            that fits decides.
        combine: how aligned weights become one, a rule of `hf_zipit.combine.rules`.
        combine_options: the rule's own options.
        refit: True, a `RefitConfig` or its settings: regress every merged module on what the experts compute on the
            calibration data; False or None: do not. `"auto"`: where the method is `"auto"` and there is data.
        corrections: what is corrected afterwards, in this order, by name or as `{name: options}`; see
            `hf_zipit.correct`. `"auto"`: what an automatic method needs, else nothing.
        polish: True, a `PolishConfig` or its settings, or its kind alone (`polish="adamerging"`): *train* the merged
            model, or a part of it, on the calibration data, after everything else; False or None, the default: do not.
        root: True, a `RootConfig` or its settings, or the anchor's task alone (`root="clothes"`): *train* the other
            experts from the anchor's weights towards their own answers before they are combined, as experts of one
            base; False or None, the default: do not.
        residues: True, a `ResidueConfig` or its settings, or its size or kind alone (`residues=1.1`, `"emr"`): keep
            what the tasks' own weights are more than the merged ones in a few bits, to be added where a task runs
            alone; False or None, the default: do not. It is for trunks that are not refitted.
        vocabulary: what happens to the tokens of experts whose tokenizers differ: `"same"` refuses them, `"union"`
            matches tokens by their text; see `hf_zipit.experts.vocabulary`.
        row_fraction: share of the positions that enter the moments, or `"auto"`: as many as cost less than the forward
            passes.
        seed: of everything that is drawn.

    Raises:
        RecipeError: a setting is unknown or out of range.
    """

    method: str = AUTO
    options: Mapping[str, Any] = field(default_factory=dict)
    depth: float | str = 1.0
    size: float | None = None
    residual: Residual = "match"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    combine: str = "average"
    combine_options: Mapping[str, Any] = field(default_factory=dict)
    refit: RefitConfig | Mapping[str, Any] | bool | Literal["auto"] | None = AUTO
    corrections: Named | Literal["auto"] = AUTO
    polish: PolishConfig | Mapping[str, Any] | str | bool | None = None
    root: RootConfig | Mapping[str, Any] | str | bool | None = None
    residues: ResidueConfig | Mapping[str, Any] | float | str | bool | None = None
    row_fraction: float | Literal["auto"] = AUTO
    vocabulary: str = "same"
    seed: int = 0

    def __post_init__(self) -> None:
        own = self.method != AUTO
        for name in ("options", "combine_options"):
            if not isinstance(getattr(self, name) or {}, Mapping):
                raise RecipeError(f"{name} is {brief(getattr(self, name))}; it must be a mapping of names to values.")
            self._set(name, dict(getattr(self, name) or {}))
        self._set("overrides", in_order(self.overrides or {}))
        if own:
            check_options(self.method, METHODS.get(self.method).function, self.options)
        elif self.options:
            raise RecipeError(f"options {sorted(self.options)} are a method's own; name the method that they are for.")
        check_options(self.combine, RULES.get(self.combine).function, self.combine_options)
        if self.refit != AUTO or own:
            self._set("refit", section(RefitConfig, False if self.refit == AUTO else self.refit, "refit"))
        if self.corrections != AUTO or own:
            self._set("corrections", correction_options(() if self.corrections == AUTO else self.corrections))
        trained = {"kind": self.polish} if isinstance(self.polish, str) else self.polish
        self._set("polish", section(PolishConfig, trained, "polish"))
        rooted = {"anchor": self.root} if isinstance(self.root, str) else self.root
        self._set("root", section(RootConfig, rooted, "root"))
        if self.root is not None and self.polish is not None:
            raise RecipeError(
                "root trains experts before they are combined, and polish towards experts as they then are; leave "
                "one of them out."
            )
        kept = {"size": self.residues} if _is_number(self.residues) else self.residues
        kept = {"kind": kept} if isinstance(kept, str) else kept
        self._set("residues", section(ResidueConfig, kept, "residues"))
        if self.residues is not None and isinstance(self.refit, RefitConfig):
            raise RecipeError(
                "residues are what the experts' weights are more than the merged ones; refitted weights answer each "
                "other and are no sum of that kind, so leave refit or residues out."
            )
        if not isinstance(self.depth, str) and not (_is_number(self.depth) and 0 <= self.depth <= 1):
            raise RecipeError(f"depth is {brief(self.depth)}; it must be a share from 0 to 1 or the path of a block.")
        if self.size is not None and not (_is_number(self.size) and self.size > 0):
            raise RecipeError(
                f"size is {brief(self.size)}; it must be a number above 0: 1.25 is a quarter more than one."
            )
        if self.size is not None and self.depth != 1:
            raise RecipeError(
                f"size={self.size:g} says how deep to merge, and so does depth={self.depth}; leave one out."
            )
        check_residual(self.residual)
        if self.vocabulary not in ("same", "union"):
            raise RecipeError(f"vocabulary is {brief(self.vocabulary)}; it must be 'same' or 'union'.")
        if self.row_fraction != AUTO and not (_is_number(self.row_fraction) and 0 < self.row_fraction <= 1):
            raise RecipeError(
                f"row_fraction is {brief(self.row_fraction)}; it must be 'auto' or a number above 0 and at most 1."
            )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < SEEDS:
            raise RecipeError(f"seed is {brief(self.seed)}; it must be a whole number from 0 to {SEEDS - 1}.")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # frozen from here on, not while it is made

    @property
    def name(self) -> str:
        """The method in one word: `zip`, or `zip+refit`."""
        return f"{self.method}{REFIT}" if isinstance(self.refit, RefitConfig) else self.method

    @property
    def automatic(self) -> bool:
        """Whether something is left to be chosen."""
        return AUTO in (self.method, self.refit, self.corrections)

    @classmethod
    def of(cls, config: MergeConfig | Mapping[str, Any] | None = None, **settings: Any) -> MergeConfig:
        """A config with some settings changed."""
        if not isinstance(config, (MergeConfig, Mapping, type(None))):
            raise RecipeError(
                f"The config is a {type(config).__name__}; give a MergeConfig, or its settings as keywords."
            )
        known = [f.name for f in fields(cls)]
        given = config if isinstance(config, Mapping) else {}
        check_known((*given, *settings), known)
        settings = {**given, **settings}
        if not isinstance(config, MergeConfig):
            return cls(**settings)
        # What an earlier method chose for itself is not asked of another one.
        if settings.get("method", config.method) != config.method:
            settings.setdefault("options", {})
        return replace(config, **settings)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `from_dict` reads again; what is in order is a list: files sort the keys of mappings."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        plain["overrides"] = [{name: value} for name, value in self.overrides.items()]
        if isinstance(self.refit, RefitConfig):
            plain["refit"] = asdict(self.refit)
        if self.polish is not None:  # where its state is kept decides nothing
            plain["polish"] = {name: value for name, value in asdict(self.polish).items() if name != "checkpoint"}
        if self.root is not None:
            plain["root"] = asdict(self.root)
        if self.residues is not None:
            plain["residues"] = asdict(self.residues)
        if self.corrections != AUTO:
            plain["corrections"] = [{name: dict(options)} for name, options in self.corrections.items()]
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in plain.items()}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> MergeConfig:
        """The config of plain values; keys that are no settings are passed over (a saved model remembers more)."""
        return cls(**{f.name: content[f.name] for f in fields(cls) if f.name in content})

    def save_pretrained(self, folder: str | Path) -> Path:
        """The file `merge_config.json` in a folder, which is made where there is none."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_json(Path(folder) / FILE, self.to_dict())
        return Path(folder) / FILE

    @classmethod
    def from_pretrained(cls, source: Any, **loading: Any) -> MergeConfig:
        """What made a merged model, or what `save_pretrained` wrote.

        Args:
            source: a merged model, its folder or repo id, or a folder with a `merge_config.json`.
            loading: arguments of a configuration's `from_pretrained`, such as `revision`.

        Raises:
            RecipeError: the model does not say how it was made.
        """
        if isinstance(source, (str, Path)):
            folder = folder_of(source)
            if folder is not None and (folder / FILE).is_file():
                return cls.from_dict(json.loads((folder / FILE).read_text(encoding="utf-8")))
            from transformers import PreTrainedConfig  # takes seconds

            content = PreTrainedConfig.get_config_dict(str(source), **loading)[0].get("method") or {}
        else:
            content = getattr(getattr(source, "config", None), "method", None) or {}
        if "method" not in content:
            raise RecipeError(f"{source if isinstance(source, str) else 'The model'} does not say how it was merged.")
        return cls.from_dict(content)


def section(schema: type[Section], given: Section | Mapping[str, Any] | bool | None, name: str) -> Section | None:
    """The settings of a part of the merge that can be left out, such as the refit; None where it is."""
    if given is None or isinstance(given, schema):
        return given  # type: ignore[return-value]
    if isinstance(given, bool):
        return schema() if given else None
    return build(schema, given, name)


def correction_options(corrections: Named) -> dict[str, dict[str, Any]]:
    """The options of every correction by its name, in the order in which they are applied.

    Raises:
        RecipeError: if one is unknown, given twice or out of place, or has no such option.
    """
    given = in_order(corrections, "corrections")
    for position, name in enumerate(given, start=1):
        if CORRECTIONS.get(name).last and position < len(given):
            raise RecipeError(
                f"{name!r} must be the last of the corrections {list(given)}: the others change what it reads."
            )
    return {name: check_options(name, CORRECTIONS.get(name).function, given[name] or {}) for name in given}


def in_order(named: Named, what: str = "overrides") -> dict[str, Any]:
    """Names and what stands beside them, in order, from any of the ways to write that.

    Raises:
        RecipeError: a name is given twice, or it is none of these ways.
    """
    if not isinstance(named, (Mapping, Sequence)):
        raise RecipeError(
            f"{what} is {brief(named)}; it must be a name, a list of names or a mapping of names to options."
        )
    found: dict[str, Any] = {}
    for item in (named,) if isinstance(named, (str, Mapping)) else named:
        pairs = item.items() if isinstance(item, Mapping) else ((item, None),)
        for name, value in pairs:
            if not isinstance(name, str):
                raise RecipeError(f"{what} should hold names, but holds {name!r}.")
            if name in found:
                raise RecipeError(f"{what} names {name!r} twice; each is applied once.")
            found[name] = value
    return found


def check_residual(residual: str) -> None:
    if residual not in get_args(Residual):
        raise RecipeError(f"residual is {brief(residual)}; it must be 'match', 'identity' or 'orthogonal'.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
