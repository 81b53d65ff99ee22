"""Models of sentence-transformers: what is merged is the transformer inside, and what comes back is of their kind.

A `SentenceTransformer`, `CrossEncoder` or `SparseEncoder` is a row of modules, of which the first is a transformer and
the others have no parameters: pooling, normalisation. The merged transformer takes the place of the first expert's, so
that pooling, normalisation, prompts and the tokenizer are kept, and everything is saved and loaded by
sentence-transformers' own classes.

`encode(texts, task="legal")` answers as that expert; without a task the tasks' token embeddings stand side by side, so
that the cosine of two joint embeddings is the mean of the tasks' similarities, each weighted by how long its
embeddings are.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from torch import nn
from transformers import PreTrainedModel

from hf_zipit.errors import ExpertError
from hf_zipit.extras import require
from hf_zipit.modeling.hub import COMPANIONS

ROLES = ("query", "document")
"""What sentence-transformers calls the task of `encode_query` and `encode_document`: no task of a merged model."""


class Sentences:
    """Experts of sentence-transformers.

    Attributes:
        models: by task.
    """

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        self.models = dict(models)
        first = next(iter(self.models))
        for task, model in self.models.items():
            if type(model) is not type(self.models[first]):
                raise ExpertError(
                    f"the expert {task!r} is a {type(model).__name__}, but {first!r} is a "
                    f"{type(self.models[first]).__name__}; experts must be of one kind"
                )
            if not isinstance(_inner(model[0]), PreTrainedModel):
                raise ExpertError(
                    f"the expert {task!r} begins with a {type(model[0]).__name__}, which holds no transformers model; "
                    "only those can be merged"
                )
            if own := next((m for m in list(model)[1:] if any(True for _ in m.parameters())), None):
                raise ExpertError(
                    f"the module {type(own).__name__} of the expert {task!r} has parameters; merge the transformers "
                    "(`model[0].auto_model`) and keep such modules apart"
                )
        kinds = {task: [type(module).__name__ for module in model] for task, model in self.models.items()}
        if other := next((task for task in kinds if kinds[task] != kinds[first]), None):
            raise ExpertError(
                f"the expert {other!r} consists of {', '.join(kinds[other])}, but {first!r} of "
                f"{', '.join(kinds[first])}; experts must have the same modules"
            )

    @classmethod
    def of(cls, experts: Any) -> Sentences | None:
        """The experts, if one of them is a loaded model of sentence-transformers; names beside it are loaded as such.

        Raises ExpertError if they do not fit each other.
        """
        if not isinstance(experts, Mapping):
            pairs = [each if isinstance(each, tuple) else (_name(each), each) for each in experts]
            experts = dict(pairs) if any(_is_sentences(model) for _, model in pairs) else {}
        kinds = [type(model) for model in experts.values() if _is_sentences(model)]
        if not kinds:
            return None
        require("sentence_transformers")
        loaded = {t: kinds[0](str(m)) if isinstance(m, (str, Path)) else m for t, m in experts.items()}
        if strange := next((task for task, model in loaded.items() if not _is_sentences(model)), None):
            raise ExpertError(
                f"the expert {strange!r} is a {type(loaded[strange]).__name__}, but others are a {kinds[0].__name__}; "
                "give all as such"
            )
        return cls(loaded)

    @property
    def transformers(self) -> dict[str, PreTrainedModel]:
        """What is merged."""
        return {task: _inner(model[0]).eval() for task, model in self.models.items()}

    @property
    def processor(self) -> Any:
        """What prepares texts: the first expert's tokenizer."""
        return next(iter(self.models.values())).tokenizer

    def around(self, merged: PreTrainedModel) -> nn.Module:
        """A model of the experts' kind with the merged transformer in it; its prompts are those of all experts."""
        first = next(iter(self.models.values()))
        inside = first[0]
        name = _attribute(inside)
        kept = inside._modules.pop(name)  # the weights need no copy
        try:
            model = copy.deepcopy(first)
        finally:
            inside._modules[name] = kept
        merged.config.joint_names = list(ROLES)
        setattr(model[0], name, merged)
        if hasattr(inside, "_declared_forward_params"):
            model[0]._declared_forward_params = set(inspect.signature(merged.forward).parameters)
            model[0].model_forward_params = None  # any keyword is taken
        if hasattr(model, "_model_card_text"):
            model._model_card_text = card(merged, type(model).__name__)  # else it would write one without lineage
        model.module_kwargs = {**(model.module_kwargs or {}), next(iter(model._modules)): ["task"]}
        if isinstance(getattr(model, "prompts", None), dict):
            for expert in self.models.values():
                model.prompts.update({key: text for key, text in expert.prompts.items() if text})
        return model.eval()


PIPELINES = {"SentenceTransformer": "sentence-similarity", "CrossEncoder": "text-ranking"}
"""The Hub's task of each kind; others put out features."""


def card(merged: PreTrainedModel, kind: str) -> str:
    """The merged model's card, for a model of sentence-transformers."""
    name = "-".join(merged.config.tasks)
    with tempfile.TemporaryDirectory() as room:
        COMPANIONS.get("card")(Path(room), merged, name, None, ["sentence-transformers"])
        found = ModelCard(Path(room, "README.md").read_text(encoding="utf-8"))
    found.data.library_name = "sentence-transformers"
    found.data.pipeline_tag = PIPELINES.get(kind, "feature-extraction")
    call = "model.predict(pairs" if kind == "CrossEncoder" else "model.encode(texts"
    usage = [
        "import hf_zipit  # pip install 'hf-zipit[st]'",
        f"from sentence_transformers import {kind}",
        "",
        f'model = {kind}("path/or/id/of/{name}")',
        f"{call})  # all tasks at once, side by side",
        *(f"{call}, task={json.dumps(task)})" for task in merged.config.tasks),
    ]
    block = "\n".join(("```python", *usage, "```"))
    text = re.sub(r"```python\n.*?```", lambda _: block, found.text, count=1, flags=re.DOTALL)
    text = re.sub(r"!\[[^\]]*\]\([\w.]+\)\n*", "", text)  # its pictures stay behind
    return f"---\n{found.data.to_yaml().strip()}\n---\n{text}"


def _is_sentences(model: Any) -> bool:
    """Whether it is a row of modules of sentence-transformers. Whoever has one has imported the package."""
    return isinstance(model, nn.Sequential) and any(
        base.__module__.startswith("sentence_transformers.") for base in type(model).__mro__
    )


def _name(model: Any) -> str:
    source = _inner(model[0]).name_or_path if _is_sentences(model) else getattr(model, "name_or_path", model)
    return Path(str(source)).name


def _attribute(transformer: nn.Module) -> str:
    """Under which name the module of sentence-transformers holds its transformer."""
    return next((name for name in ("model", "auto_model") if name in transformer._modules), "")


def _inner(transformer: nn.Module) -> Any:
    return transformer._modules.get(_attribute(transformer))
