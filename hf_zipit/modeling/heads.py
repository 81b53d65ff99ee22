"""The merged models by what they put out: features, or logits for images, sequences, tokens and masked tokens.

Signatures are explicit, because Trainer drops the columns of a dataset that are not in them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoModelForImageTextToText,
    AutoModelForSpeechSeq2Seq,
    AutoModelForZeroShotImageClassification,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.initialization import no_init_weights
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from ..errors import ZipItError
from .base import Outputs, Task, ZipItPreTrainedModel
from .configuration import ZipItConfig
from .empty_model import source_class
from .joint import joint_embedding, joint_loss, mask_foreign, pick, side_by_side, vote
from .source_loss import noted_loss

ANSWERS = ("logits", "start_logits", "end_logits", "pred_logits", "pred_boxes", "pred_masks", "class_queries_logits",
           "predicted_depth")  # fmt: skip
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

    def voted(self, outputs: dict[str, ModelOutput], *fields: str) -> ModelOutput:
        """The tasks' outputs side by side, but for some fields, which are the log of the mean of the tasks'."""
        joint = super().join(outputs)
        for name in fields:
            joint[name] = vote([output[name] for output in outputs.values()])
        return joint

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


class ZipItForAudioClassification(ZipItLabelled):
    """Merged sound classifiers; logits `[batch, classes]`."""

    source_suffix = "ForAudioClassification"
    auto_class = "AutoModelForAudioClassification"

    @can_return_tuple
    def forward(
        self,
        input_values: Tensor | None = None,
        input_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        task: Task = None,
        **kwargs: Any,
    ) -> Outputs:
        return self.compute(
            task, labels, input_values=input_values, input_features=input_features, attention_mask=attention_mask,
            **kwargs,
        )  # fmt: skip


class ZipItForVideoClassification(ZipItForImageClassification):
    """Merged classifiers of clips; logits `[batch, classes]`."""

    source_suffix = "ForVideoClassification"
    auto_class = "AutoModelForVideoClassification"


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


def one_or_all(merged: ZipItPreTrainedModel, task: Task) -> str | None:
    """The task that is generated for, or None for all; raises ZipItError for several tasks in one batch."""
    chosen = merged.choose(task)
    if isinstance(chosen, list):
        raise ZipItError("A batch of several tasks cannot be generated; generate for one task at a time.")
    return chosen


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
        chosen = one_or_all(self, task)
        if chosen is None:
            kwargs["use_cache"] = False
        elif kwargs.get("use_cache", True) and not {"past_key_values", "cache_implementation"} & kwargs.keys():
            # Of the experts' kind: this model's own configuration knows nothing of layers.
            text = self.config.source_config.get_text_config(decoder=True)
            kwargs["past_key_values"] = DynamicCache(config=text)
        return super().generate(*args, task=chosen, **kwargs)


class ZipItForQuestionAnswering(ZipItModel):
    """Merged models that find an answer in a text; jointly, start and end are those of the mean of all experts."""

    source_suffix = "ForQuestionAnswering"
    auto_class = "AutoModelForQuestionAnswering"

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        task: Task = None,
        **kwargs: Any,
    ) -> Outputs:
        output = self.compute(
            task, None, input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids,
            start_positions=start_positions, end_positions=end_positions, **kwargs,
        )  # fmt: skip
        if self.choose(task) is None and start_positions is not None and end_positions is not None:
            wanted = (("start_logits", start_positions), ("end_logits", end_positions))
            losses = [joint_loss(output[name], positions.flatten()) for name, positions in wanted]
            output = type(output)(**{**output, "loss": sum(losses) / 2})
        return output

    def join(self, outputs: dict[str, ModelOutput]) -> ModelOutput:
        return self.voted(outputs, "start_logits", "end_logits")


class ZipItWriter(ZipItModel):
    """Merged models that answer with a row of tokens, of one vocabulary: joint logits are a vote.

    The joint loss is the one that the source class takes, of the joint logits. Raises ZipItError where it cannot be
    told how that class takes it.
    """

    def compute(self, task: Task, labels: Tensor | None, /, **inputs: Any) -> ModelOutput:
        if labels is None or self.choose(task) is not None:
            return super().compute(task, labels, **inputs)
        inputs = {name: value for name, value in inputs.items() if value is not None}
        first: Any = self.branch(self.config.tasks[0])
        with noted_loss(first) as noted:
            joint = self.join(self.run_branches(lambda task: self.run_branch(task, {**inputs, "labels": labels})))
        if not noted and not self.config.source_config.is_encoder_decoder:
            raise ZipItError(
                f"{self.config.source_architecture} takes its loss in a way of its own, so there is no joint one; "
                f"name a task, task={self.config.tasks[0]!r}."
            )
        loss = noted[0](joint["logits"]) if noted else joint_loss(joint["logits"], labels)
        return type(joint)(**{**joint, "loss": loss})

    def join(self, outputs: dict[str, ModelOutput]) -> ModelOutput:
        return self.voted(outputs, "logits")


class ZipItForCTC(ZipItWriter):
    """Merged models that transcribe speech frame by frame; jointly by the mean of the distributions of all experts."""

    source_suffix = "ForCTC"
    auto_class = "AutoModelForCTC"

    @can_return_tuple
    def forward(
        self,
        input_values: Tensor | None = None,
        input_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        task: Task = None,
        **kwargs: Any,
    ) -> Outputs:
        return self.compute(
            task, labels, input_values=input_values, input_features=input_features, attention_mask=attention_mask,
            **kwargs,
        )  # fmt: skip


class ZipItForConditionalGeneration(ZipItWriter):
    """Merged models that write for an input: a text (T5), speech (Whisper) or an image (LLaVA).

        merged.generate(input_features, task="french")   # as that expert does, with its cache
        merged.generate(input_features)                  # every token by the mean of all experts

    Joint logits are a vote, `[batch, tokens, vocabulary]`; the loss of given labels is that of the class itself.
    """

    source_suffix = ("ForConditionalGeneration", "MTModel", "ForSpeechSeq2Seq")
    auto_class = "AutoModelForSeq2SeqLM"

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        input_features: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        task: Task = None,
        **kwargs: Any,
    ) -> Outputs:
        if not isinstance(self.choose(task), str):
            kwargs["use_cache"] = False  # each task would need a cache of its own
        return self.compute(
            task, labels, input_ids=input_ids, attention_mask=attention_mask, decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask, input_features=input_features, pixel_values=pixel_values,
            **kwargs,
        )  # fmt: skip

    def generate(self, inputs: Tensor | None = None, *, task: Task = None, **kwargs: Any) -> Any:
        """As the experts' class does for one task; else with every token chosen by the mean of all tasks.

        Raises ZipItError for an unknown task, or several tasks in one batch.
        """
        chosen = one_or_all(self, task)
        branch: Any = self.branch(self.config.tasks[0] if chosen is None else chosen)
        given = {**kwargs, **({} if inputs is None else {branch.main_input_name: inputs})}
        if chosen is None:
            read = {name: x for name, x in given.items() if isinstance(x, Tensor) and not name.startswith("decoder")}
            own = kwargs.get("logits_processor") or ()
            given["logits_processor"] = LogitsProcessorList([*own, _JointNext(self, read)])
        return branch.generate(**given)


class _JointNext(LogitsProcessor):
    """The scores of the next token by the mean of all tasks, given what was written; what is ruled out stays so."""

    def __init__(self, merged: ZipItForConditionalGeneration, inputs: Mapping[str, Tensor]) -> None:
        self.merged, self.inputs = merged, inputs

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        read = {name: x.repeat_interleave(len(input_ids) // len(x), 0) for name, x in self.inputs.items()}
        if self.merged.config.source_config.is_encoder_decoder:
            read["decoder_input_ids"] = input_ids
        else:
            read |= {"input_ids": input_ids, "attention_mask": self._seen(read.get("attention_mask"), input_ids)}
        logits = self.merged(**read, task=None)["logits"][:, -1].to(scores)
        return logits.masked_fill(scores.isneginf(), -torch.inf)

    @staticmethod
    def _seen(mask: Tensor | None, ids: Tensor) -> Tensor:
        """The prompt's mask, with ones for what was written."""
        seen = torch.ones_like(ids)
        if mask is not None:
            seen[:, : mask.shape[1]] = mask
        return seen


class ZipItForObjectDetection(ZipItModel):
    """Merged detectors, which answer for one task at a time."""

    source_suffix = "ForObjectDetection"
    auto_class = "AutoModelForObjectDetection"


class ZipItForSemanticSegmentation(ZipItModel):
    """Merged models that give every pixel a class, for one task at a time."""

    source_suffix = "ForSemanticSegmentation"
    auto_class = "AutoModelForSemanticSegmentation"


class ZipItForDepthEstimation(ZipItModel):
    """Merged models that give every pixel its depth, for one task at a time."""

    source_suffix = "ForDepthEstimation"
    auto_class = "AutoModelForDepthEstimation"


MERGED_CLASSES: tuple[type[ZipItPreTrainedModel], ...] = (
    ZipItForImageClassification, ZipItForSequenceClassification, ZipItForTokenClassification, ZipItForMaskedLM,
    ZipItForCausalLM, ZipItForAudioClassification, ZipItForVideoClassification, ZipItForQuestionAnswering, ZipItForCTC,
    ZipItForConditionalGeneration, ZipItForObjectDetection, ZipItForSemanticSegmentation, ZipItForDepthEstimation,
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
for _auto in (AutoModelForSpeechSeq2Seq, AutoModelForImageTextToText):
    _auto.register(ZipItConfig, ZipItForConditionalGeneration, exist_ok=True)
