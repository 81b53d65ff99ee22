"""Models that answer with no class are measured by what they are made for: texts, maps of classes, boxes."""

from __future__ import annotations

import copy
import json
import string
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as T
from PIL import Image
from sklearn.metrics import jaccard_score
from torch.nn import functional as F

import hf_zipit
from hf_zipit import metrics
from hf_zipit.errors import DataError
from hf_zipit.evaluation.kinds import likeliest_spans
from hf_zipit.evaluation.side_by_side import answers_ahead
from tests.modeling.test_kinds import IDS, bart, pair
from tests.processors import tokenizer

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}

# ------------------------------------------------------------------------------------------------ the metrics alone


def test_error_rates_count_what_was_changed() -> None:
    pytest.importorskip("jiwer")
    said, right = ["the cat sat", "a dog"], ["the cat sat down", "the dog"]
    assert metrics.wer.compute(predictions=said, references=right) == {"wer": pytest.approx(2 / 6)}
    assert metrics.cer.measures(["abc"], ["abd"]) == {"cer": pytest.approx(1 / 3)}
    found = metrics.wer.intervals(said, right)["wer"]
    assert found.low <= found.value <= found.high and found.value == pytest.approx(2 / 6)
    with pytest.raises(DataError, match="empty"):
        metrics.wer.measures(["a"], [" "])


def test_answers_are_compared_as_in_squad() -> None:
    found = metrics.squad.compute(predictions=["The cat!", "a red boot"], references=[["cat"], ["cap", "blue boot"]])
    assert found == {"exact_match": 0.5, "f1": pytest.approx((1 + 0.5) / 2)}


def test_the_mean_iou_is_that_of_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    given, right = generator.integers(0, 4, (2, 3, 6, 5))
    right[:, 0] = -100
    kept = right != -100
    found = metrics.mean_iou.compute(predictions=given.tolist(), references=right.tolist())
    assert found["mean_iou"] == pytest.approx(jaccard_score(right[kept], given[kept], average="macro"))
    assert found["overall_accuracy"] == pytest.approx((given == right)[kept].mean())


def test_boxes_that_are_right_have_full_precision_and_moved_ones_less() -> None:
    pytest.importorskip("pycocotools")
    boxes = np.array([[0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 0.9]])
    right = [{"boxes": boxes, "labels": [0, 1]}]
    assert metrics.mean_average_precision.measures([{**right[0], "scores": [0.9, 0.8]}], right) == {
        "map": pytest.approx(1), "map_50": pytest.approx(1)
    }  # fmt: skip
    moved = [{"boxes": boxes + np.array([0, 0, 0.1, 0]), "labels": [0, 1], "scores": [0.9, 0.8]}]  # IoU 5/6
    found = metrics.mean_average_precision.measures(moved, right)
    assert found == {"map": pytest.approx(0.7), "map_50": pytest.approx(1)}


# ------------------------------------------------------------------------------------------------------- by kind


def test_transcripts_are_measured_by_word_and_character_errors(tmp_path: Path) -> None:
    pytest.importorskip("jiwer")
    known = ["<pad>", "|", "<unk>", "'", *string.ascii_lowercase]
    (tmp_path / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(known)}))
    letters = T.Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"), bos_token=None, eos_token=None)
    kernels = {"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    experts, merged = pair(T.Wav2Vec2ForCTC, **SIZES, **kernels, **positions)
    sounds = torch.randn(3, 200)
    with torch.no_grad():
        said = letters.batch_decode(experts["b"](sounds).logits.argmax(-1))
    rows = [{"input_values": sound, "text": text} for sound, text in zip(sounds, said, strict=True)]
    found = hf_zipit.evaluate(merged, {"b": rows}, experts, processor=letters, batch_size=2)
    assert found.scores["b"] == {"wer": 0.0, "cer": 0.0}
    assert found.expert_scores == found.scores and found.model is None
    ids = [{"input_values": sounds[0], "labels": torch.tensor([3, 3, 1, 4, -100])}]  # two equal letters stay two
    cer = hf_zipit.evaluate(merged, {"b": ids}, metrics="cer", processor=letters).scores["b"]
    assert cer == metrics.cer.measures(said[:1], ["'' a"])
    with pytest.raises(DataError, match="does not answer with map"):
        hf_zipit.evaluate(merged, {"b": rows}, metrics="mean_iou", processor=letters)
    with pytest.raises(DataError, match="nothing writes the tokens"):
        hf_zipit.evaluate(merged, {"b": rows})


def test_what_is_written_for_a_text_has_a_perplexity_and_error_rates_where_they_are_named() -> None:
    pytest.importorskip("jiwer")
    experts, merged = bart()
    ids = IDS % 14
    rows = [{"input_ids": row, "labels": row[:5]} for row in ids]
    found = hf_zipit.evaluate(merged, {"b": rows}, experts)
    with torch.no_grad():
        expected = experts["b"](input_ids=ids, labels=ids[:, :5].contiguous()).loss.exp()
    assert found.scores["b"]["perplexity"] == pytest.approx(expected.item(), rel=1e-4)
    assert found.expert_scores["b"]["perplexity"] == pytest.approx(expected.item(), rel=1e-4)
    assert hf_zipit.evaluate(merged, {"b": rows}, metrics="wer", processor=tokenizer()).scores["b"]["wer"] > 0
    assert not answers_ahead(type(merged), experts["b"].config)
    assert answers_ahead(type(merged), T.LlavaConfig())


def test_spans_are_measured_by_exact_match_and_f1() -> None:
    start, end = torch.zeros(1, 5), torch.zeros(1, 5)
    start[0, 3], start[0, 0], end[0, 2], end[0, 4] = 5, 9, 6, 4
    inside = torch.tensor([[False, True, True, True, True]])
    assert likeliest_spans({"start_logits": start, "end_logits": end}, inside) == [(3, 4)]  # never backwards
    experts, merged = pair(T.BertForQuestionAnswering, **SIZES)
    with torch.no_grad():
        read = experts["b"](input_ids=IDS)
    spans = likeliest_spans(read, torch.ones_like(IDS).bool())
    rows = [
        {"input_ids": ids, "start_positions": a, "end_positions": b} for ids, (a, b) in zip(IDS, spans, strict=True)
    ]
    found = hf_zipit.evaluate(merged, {"b": rows}, experts)
    assert found.scores["b"] == {"exact_match": 1.0, "f1": 1.0} == found.expert_scores["b"]
    asked = {"question": "the photo", "context": "a red boot of the shirt", "answers": {"text": ["boot"]}}
    words = hf_zipit.evaluate(merged, {"b": [asked, asked]}, metrics="squad", processor=tokenizer()).scores["b"]
    assert words["exact_match"] in (0.0, 1.0)
    with pytest.raises(DataError, match="cannot run on the evaluation data of the task 'b'"):
        hf_zipit.evaluate(merged, {"b": [{**rows[0], "input_ids": IDS[0] + 30}]})
    with pytest.raises(DataError, match="neither a 'question'"):
        hf_zipit.evaluate(merged, {"b": [{"input_ids": IDS[0]}]})


def test_maps_are_measured_at_the_size_of_the_right_ones() -> None:
    config = T.SegformerConfig(
        num_encoder_blocks=1, depths=[1], sr_ratios=[1], hidden_sizes=[8], patch_sizes=[3], strides=[2],
        num_attention_heads=[1], mlp_ratios=[2], decoder_hidden_size=8, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = T.SegformerForSemanticSegmentation(config).eval()
    experts = {"a": model, "b": copy.deepcopy(model)}
    merged = hf_zipit.merge(experts, method="identity", refit=None)
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        right = F.interpolate(model(pixels).logits, size=(10, 12), mode="bilinear").argmax(1)
    right[:, 0] = 255
    rows = [{"pixel_values": image, "labels": own} for image, own in zip(pixels, right, strict=True)]
    found = hf_zipit.evaluate(merged, {"b": rows}, experts)
    assert found.scores["b"] == {"mean_iou": 1.0, "overall_accuracy": 1.0} == found.expert_scores["b"]
    assert found.score_intervals["b"]["mean_iou"].low == 1


def test_boxes_are_read_by_the_image_processor() -> None:
    pytest.importorskip("pycocotools")
    torch.manual_seed(0)
    images = {"image_size": [32, 32], "patch_size": 8, "num_detection_tokens": 4, "num_labels": 3}
    model = T.YolosForObjectDetection(T.YolosConfig(**SIZES, **images)).eval()
    experts = {"a": model, "b": copy.deepcopy(model)}
    merged = hf_zipit.merge(experts, method="identity", refit=None)
    processor = T.YolosImageProcessor(size={"height": 32, "width": 32}, do_pad=False)
    picture = Image.new("RGB", (40, 20), "navy")
    with torch.no_grad():
        output = model(**processor(picture, return_tensors="pt"))
    boxes = processor.post_process_object_detection(output, threshold=0.0, target_sizes=[(20, 40)])[0]
    corners = boxes["boxes"].numpy()
    sizes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
    rows = [{"image": picture, "objects": {"bbox": sizes, "category": boxes["labels"].tolist()}}]
    found = hf_zipit.evaluate(merged, {"b": rows}, experts, processor=processor)
    assert found.scores["b"]["map"] > 0.5 and found.expert_scores == found.scores
    prepared = {"boxes": output.pred_boxes[0], "class_labels": output.logits[0, :, :-1].argmax(-1)}
    rows = [{"pixel_values": processor(picture)["pixel_values"][0], "labels": prepared}]
    again = hf_zipit.evaluate(merged, {"b": rows}, processor=processor).scores["b"]
    assert again == pytest.approx(found.scores["b"])
    with pytest.raises(DataError, match="give its image processor"):
        hf_zipit.evaluate(merged, {"b": rows})
