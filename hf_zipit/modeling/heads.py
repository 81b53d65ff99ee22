"""The merged models by what they put out: features, or logits for images, sequences, tokens and masked tokens.

Signatures are explicit, because Trainer drops the columns of a dataset that are not in them.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForZeroShotImageClassification, DynamicCache, GenerationConfig, GenerationMixin
from transformers.initialization import no_init_weights
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from ..errors import ZipItError
from .base import Outputs, Task, ZipItPreTrainedModel
from .configuration import ZipItConfig
from .empty_model import source_class
from .joint import joint_embedding, mask_foreign, pick, side_by_side, vote

ANSWERS = ("logits", "start_logits", "end_logits", "pred_logits", "pred_boxes", "pred_masks", "class_queries_logits")
"""Outputs that are answers, not features, of models without classes of their own: spans, next tokens, boxes."""


class ZipItModel(ZipItPreTrainedModel):
    """Merged models without labels, such as `CLIPModel`, `BertModel` or `ResNetModel`.

    Joint features are the tasks' side by side; embeddings are unit vectors whose cosine similarity is the mean of the
    tasks' similarities, and `logits_per_image` and `logits_per_text` the means of the tasks'.
    """

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        task: Task = None,
        **kwargs: Any,
    ) -> Outputs:
        return self.compute(
            task, None, pixel_values=pixel_values, input_ids=input_ids, attention_mask=attention_mask,
            token_type_ids=token_type_ids, position_ids=position_ids, inputs_embeds=inputs_embeds, **kwargs,
        )  # fmt: skip

    def join(self, outputs: dict[str, ModelOutput]) -> ModelOutput:
        """The features side by side. Raises ZipItError for answers of which that would be none."""
        fields = next(iter(outputs.values()))
        if alone := next((name for name in ANSWERS if name in fields), None):
            raise ZipItError(
                f"A merge of {self.config.source_architecture} models has no joint {alone}: those of its tasks do not "
                f"add up to one answer, so name the one you mean, task={self.config.tasks[0]!r}."
            )
        return super().join(outputs)

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, task: Task = None, **kwargs: Any) -> Outputs:
        """Image embeddings as the source class returns them, or joint ones (unit vectors) in `pooler_output`."""
        return self.contrastive_features("get_image_features", task, pixel_values=pixel_values, **kwargs)

    @can_return_tuple
    def get_text_features(self, input_ids: Tensor, task: Task = None, **kwargs: Any) -> Outputs:
        """Text embeddings as the source class returns them, or joint ones (unit vectors) in `pooler_output`."""
        return self.contrastive_features("get_text_features", task, input_ids=input_ids, **kwargs)

    def contrastive_features(self, method: str, task: Task, /, **inputs: Any) -> ModelOutput:
        """What a method of the source class gives for one task, or the joint embeddings in `pooler_output`."""
        inputs = {name: value for name, value in inputs.items() if value is not None}
        chosen = self.choose(task)
        if isinstance(chosen, list):
            return self.join_samples({}, chosen)
        if not hasattr(source_class(self.config.source_architecture), method):
            raise ZipItError(f"A merge of {self.config.source_architecture} models has no {method}.")
        if chosen is not None:
            return getattr(self.branch(chosen), method)(**inputs)
        outputs = list(self.run_branches(lambda name: getattr(self.branch(name), method)(**inputs)).values())
        joint = side_by_side(outputs)
        joint["pooler_output"] = joint_embedding([output.pooler_output for output in outputs])
        return joint


class ZipItLabelled(ZipItPreTrainedModel):
    """Merged models with logits: joined class by class, or by vote where all tasks have the same classes."""

    source_suffix: ClassVar[str | tuple[str, ...]]

    def __init__(self, config: ZipItConfig) -> None:
        fitting = merged_class(config.source_architecture)
        if fitting is not type(self):
            raise ZipItError(
                f"A merge of {config.source_architecture} models is not a {type(self).__name__} but a "
                f"{fitting.__name__}; load it with {fitting.auto_class}."
            )
        super().__init__(config)

    def join(self, outputs: dict[str, ModelOutput]) -> ModelOutput:
        logits = [output["logits"] for output in outputs.values()]
        joint = super().join(outputs)
        voting = self.config.joint == "vote"
        joint["logits"] = vote(logits, self.config.problem_type) if voting else torch.cat(logits, dim=-1)
        return joint

    def join_samples(self, outputs: dict[str, ModelOutput], sample_tasks: list[str]) -> ModelOutput:
        """Joint classes with those of other tasks masked out; where all tasks have the same, the own task's logits."""
        joint = self.join(outputs)
        logits = {task: output["logits"] for task, output in outputs.items()}
        if len(sample_tasks) != joint["logits"].shape[0]:
            raise ZipItError(
                f"{len(sample_tasks)} task names came with a batch of {joint['logits'].shape[0]} samples."
            )
        if self.config.joint == "vote":
            joint["logits"] = pick(logits, sample_tasks)
        else:
            widths = {task: values.shape[-1] for task, values in logits.items()}
            joint["logits"] = mask_foreign(joint["logits"], sample_tasks, self.config.offsets(), widths)
        return joint


class ZipItForImageClassification(ZipItLabelled):
    """Merged image classifiers; logits `[batch, classes]`."""

    source_suffix = "ForImageClassification"
    auto_class = "AutoModelForImageClassification"

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor | None = None, labels: Tensor | None = None, task: Task = None, **kwargs: Any
    ) -> Outputs:
        return self.compute(task, labels, pixel_values=pixel_values, **kwargs)


class ZipItForText(ZipItLabelled):
    """The signature that all text models share."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        task: Task = None,
        **kwargs: Any,
    ) -> Outputs:
        return self.compute(
            task, labels, input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids,
            position_ids=position_ids, inputs_embeds=inputs_embeds, **kwargs,
        )  # fmt: skip


class ZipItForSequenceClassification(ZipItForText):
    """Merged sequence classifiers; logits `[batch, classes]`."""

    source_suffix = "ForSequenceClassification"
    auto_class = "AutoModelForSequenceClassification"


class ZipItForTokenClassification(ZipItForText):
    """Merged token classifiers; logits `[batch, tokens, classes]`."""

    source_suffix = "ForTokenClassification"
    auto_class = "AutoModelForTokenClassification"


class ZipItForMaskedLM(ZipItForText):
    """Merged masked language models of one vocabulary; joint logits are a vote, `[batch, tokens, vocabulary]`."""

    source_suffix = "ForMaskedLM"
    auto_class = "AutoModelForMaskedLM"


class ZipItForCausalLM(ZipItForText, GenerationMixin):
    """Merged causal language models of one vocabulary; joint logits are a vote, `[batch, tokens, vocabulary]`.

        merged.generate(**tokenizer("Once", return_tensors="pt"), task="tales")  # as that expert, with a cache
        merged.generate(**tokenizer("Once", return_tensors="pt"))                # by the mean of all experts

    Labels are the tokens themselves, as everywhere in transformers: the loss is that of the next token.
    """

    source_suffix = ("ForCausalLM", "LMHeadModel")
    auto_class = "AutoModelForCausalLM"

    def __init__(self, config: ZipItConfig) -> None:
        super().__init__(config)
        self.generation_config = GenerationConfig.from_model_config(copy.deepcopy(config.source_config))

    def compute(self, task: Task, labels: Tensor | None, /, **inputs: Any) -> ModelOutput:
        if isinstance(self.choose(task), str):
            return super().compute(task, labels, **inputs)
        if inputs.pop("past_key_values", None) is not None:
            raise ZipItError("A joint forward pass has no cache: each task would need its own; name a task.")
        inputs["use_cache"] = False
        ahead = None if labels is None else functional.pad(labels[:, 1:], (0, 1), value=-100)
        return super().compute(task, ahead, **inputs)

    def generate(self, *args: Any, task: Task = None, **kwargs: Any) -> Any:
        """As in transformers, for one task, or by the mean of the distributions of all, which has no cache.

        Raises ZipItError for an unknown task, or several tasks in one batch.
        """
        chosen = self.choose(task)
        if isinstance(chosen, list):
            raise ZipItError("A batch of several tasks cannot be generated; generate for one task at a time.")
        if chosen is None:
            kwargs["use_cache"] = False
        elif kwargs.get("use_cache", True) and not {"past_key_values", "cache_implementation"} & kwargs.keys():
            # Of the experts' kind: this model's own configuration knows nothing of layers.
            text = self.config.source_config.get_text_config(decoder=True)
            kwargs["past_key_values"] = DynamicCache(config=text)
        return super().generate(*args, task=chosen, **kwargs)


MERGED_CLASSES: tuple[type[ZipItPreTrainedModel], ...] = (
    ZipItForImageClassification, ZipItForSequenceClassification, ZipItForTokenClassification, ZipItForMaskedLM,
    ZipItForCausalLM,
)  # fmt: skip


def merged_class(source_architecture: str | None) -> type[ZipItPreTrainedModel]:
    """The merged model's class for experts of this class, by the end of its name; `ZipItModel` for all others."""
    name = source_architecture or ""
    return next((found for found in MERGED_CLASSES if name.endswith(found.source_suffix)), ZipItModel)


def build(config: ZipItConfig) -> ZipItPreTrainedModel:
    """A merged model whose parameters mean nothing yet, to be filled by `load_state_dict` (strict)."""
    with no_init_weights():  # drawing a whole model per task takes longer than filling it
        return merged_class(config.source_architecture)._from_config(config)


for _merged in (ZipItModel, *MERGED_CLASSES):
    getattr(transformers, _merged.auto_class).register(ZipItConfig, _merged, exist_ok=True)
AutoModelForZeroShotImageClassification.register(ZipItConfig, ZipItModel, exist_ok=True)
