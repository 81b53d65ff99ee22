"""Merged models of more kinds do what their Auto class promises: write, transcribe, find spans, detect."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers as T
from PIL import Image
from torch.nn import functional as F
from transformers import PreTrainedModel

import hf_zipit
from hf_zipit.errors import ZipItError
from hf_zipit.modeling import ZipItPreTrainedModel
from hf_zipit.symmetry import MergeSpec
from hf_zipit.symmetry.group import apply_element, random_element
from hf_zipit.symmetry.proof import model_tensors, perturb

IDS = torch.arange(4, 16).view(2, 6)


def pair(
    model_class: type[PreTrainedModel], **settings: object
) -> tuple[dict[str, PreTrainedModel], ZipItPreTrainedModel]:
    """Two experts with one trunk and heads of their own, and their merge, which computes what they do."""
    torch.manual_seed(0)
    first = model_class(model_class.config_class(vocab_size=30, pad_token_id=0, **settings)).eval()
    second = copy.deepcopy(first)
    head = second.get_output_embeddings() or getattr(second, "lm_head", None) or second.qa_outputs
    head.weight = torch.nn.Parameter(head.weight + torch.randn_like(head.weight))
    if hasattr(second, "final_logits_bias"):  # of the head, though it stands beside it, in no parameter
        second.final_logits_bias = torch.randn_like(second.final_logits_bias)
    experts = {"a": first, "b": second}
    return experts, hf_zipit.merge(experts, method="identity", refit=None)


def bart() -> tuple[dict[str, PreTrainedModel], ZipItPreTrainedModel]:
    parts = ("layers", "attention_heads", "ffn_dim")
    sizes = {f"{side}_{part}": n for side in ("encoder", "decoder") for part, n in zip(parts, (1, 2, 16), strict=True)}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "tie_word_embeddings": False}
    return pair(T.BartForConditionalGeneration, d_model=16, max_position_embeddings=20, **sizes, **ends)


@torch.no_grad()
def test_a_task_is_written_as_by_its_expert_and_all_by_their_mean(tmp_path: Path) -> None:
    experts, merged = bart()
    merged.save_pretrained(tmp_path)
    loaded = T.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    how = {"max_new_tokens": 5, "do_sample": False}
    for task, expert in experts.items():
        expected = expert.generate(IDS, **how)
        assert torch.equal(loaded.generate(IDS, task=task, **how), expected)
        assert torch.equal(loaded.for_task(task).generate(input_ids=IDS, **how), expected)
    start = torch.full((2, 1), 2)
    chances = [e(input_ids=IDS, decoder_input_ids=start).logits[:, -1].softmax(-1) for e in experts.values()]
    assert torch.equal(loaded.generate(IDS, **how)[:, 1], sum(chances).argmax(-1))
    assert loaded.generate(IDS, num_beams=2, **how).shape[0] == 2
    labels = IDS.clone()
    expected = experts["a"](input_ids=IDS, labels=labels).loss
    torch.testing.assert_close(loaded(input_ids=IDS, labels=labels, task="a").loss, expected)
    joint = loaded(input_ids=IDS, labels=labels)
    expected = [expert(input_ids=IDS, labels=labels).logits.softmax(-1) for expert in experts.values()]
    torch.testing.assert_close(joint.loss, F.nll_loss((sum(expected) / 2).log().flatten(0, 1), labels.flatten()))


@torch.no_grad()
def test_a_transcript_has_a_joint_loss_which_is_that_of_the_mean() -> None:
    kernels = {"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2}
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    experts, merged = pair(T.Wav2Vec2ForCTC, **sizes, **kernels, **positions)
    sounds = {"input_values": torch.randn(2, 200), "attention_mask": torch.ones(2, 200).long()}
    sounds["attention_mask"][1, 150:] = 0
    labels = torch.tensor([[4, 5, 6], [7, 8, -100]])
    losses = {task: expert(**sounds, labels=labels).loss for task, expert in experts.items()}
    torch.testing.assert_close(merged(**sounds, labels=labels, task="b").loss, losses["b"])
    mean = sum(expert(**sounds).logits.softmax(-1) for expert in experts.values()) / 2
    frames = experts["a"]._get_feat_extract_output_lengths(sounds["attention_mask"].sum(-1))
    written = torch.tensor([3, 2])
    expected = F.ctc_loss(mean.log().transpose(0, 1), labels, frames, written, reduction="sum")
    torch.testing.assert_close(merged(**sounds, labels=labels).loss, expected)
    assert "_loss_function" not in vars(merged.branch("a"))


@torch.no_grad()
def test_the_joint_span_is_that_of_the_mean() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    experts, merged = pair(T.BertForQuestionAnswering, **sizes)
    where = {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])}
    own = {task: expert(input_ids=IDS, **where) for task, expert in experts.items()}
    torch.testing.assert_close(merged(input_ids=IDS, task="b", **where).loss, own["b"].loss)
    joint = merged(input_ids=IDS, **where)
    mean = sum(output.start_logits.softmax(-1) for output in own.values()) / 2
    torch.testing.assert_close(joint.start_logits.exp(), mean)
    assert joint.loss > 0


@torch.no_grad()
def test_a_detector_merged_with_its_reordered_copy_finds_the_same_boxes() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    images = {"image_size": [32, 32], "patch_size": 8, "num_detection_tokens": 4}
    model = T.YolosForObjectDetection(T.YolosConfig(**sizes, **images)).eval()
    model.load_state_dict(perturb(model.state_dict(), torch.Generator().manual_seed(1)))
    spec = MergeSpec.from_model(model)
    element = random_element(spec, torch.Generator().manual_seed(2), permutations_only=True)
    other = copy.deepcopy(model)
    other.load_state_dict({**other.state_dict(), **apply_element(model_tensors(model), spec, element)})
    merged = hf_zipit.merge({"a": model, "b": other}, method="weights", refit=None)
    pixels = torch.randn(2, 3, 32, 32)
    for task, expert in {"a": model, "b": other}.items():
        found, expected = merged(pixels, task=task), expert(pixels)
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.pred_boxes, expected.pred_boxes, rtol=1e-4, atol=1e-4)
    with pytest.raises(ZipItError, match="no joint logits"):
        merged(pixels)
    processor = T.YolosImageProcessor(size={"height": 32, "width": 32}, do_pad=False)
    how = {"image_processor": processor, "threshold": 0.0}
    picture = Image.new("RGB", (32, 32), "navy")
    ours, theirs = (T.pipeline("object-detection", model=m, **how)(picture) for m in (merged.for_task("a"), model))
    assert [answer["box"] for answer in ours] == [answer["box"] for answer in theirs] != []
