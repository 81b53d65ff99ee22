"""What the Hub's validation of a model card's metadata refuses, as far as it can be told without the Hub.

Taken from its documentation (huggingface.co/docs/hub/model-cards, and the specification of `model-index`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

REPO = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
RELATIONS = ("adapter", "finetune", "merge", "quantized")
PIPELINES = (
    "image-classification", "text-classification", "token-classification", "fill-mask", "feature-extraction",
    "zero-shot-image-classification", "text-generation", "image-feature-extraction",
)  # fmt: skip
LICENCES = (
    "apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-4.0", "cc0-1.0", "gpl-3.0", "openrail", "llama3",
    "unknown", "other",
)  # fmt: skip


def problems(card: str) -> list[str]:
    """Everything that is wrong with a card's metadata; empty for a good one."""
    block = REGEX_YAML_BLOCK.search(card)
    if block is None or not card.startswith("---"):
        return ["there is no metadata at the start"]
    try:
        data = yaml.safe_load(block.group(2))
    except yaml.YAMLError as error:
        return [f"the metadata is no YAML: {error}"]
    if not isinstance(data, dict):
        return ["the metadata is no mapping"]
    return list(_problems(data))


def _problems(data: dict[str, Any]) -> Iterator[str]:
    for key, value in data.items():
        if value is None or value == []:
            yield f"{key} is empty"
    yield from _repos(data, "base_model")
    yield from _repos(data, "datasets")
    if "base_model_relation" in data and data["base_model_relation"] not in RELATIONS:
        yield "base_model_relation is unknown"
    if ("base_model_relation" in data) != ("base_model" in data):
        yield "base_model and base_model_relation go together"
    if data.get("pipeline_tag", PIPELINES[0]) not in PIPELINES:
        yield f"pipeline_tag {data['pipeline_tag']!r} is unknown"
    if "license" in data and data["license"] not in LICENCES:
        yield f"license {data['license']!r} is unknown"
    if data.get("license") == "other" and "license_name" not in data:
        yield "license other needs a license_name"
    tags = data.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags) or len(set(tags)) < len(tags):
        yield "tags should be different texts"
    for entry in data.get("model-index", []):
        yield from _model(entry)


def _repos(data: dict[str, Any], key: str) -> Iterator[str]:
    value = data.get(key, [])
    for repo in value if isinstance(value, list) else [value]:
        if not isinstance(repo, str) or not REPO.fullmatch(repo):
            yield f"{key} holds {repo!r}, which is no repo id"


def _model(entry: Any) -> Iterator[str]:
    if not isinstance(entry.get("name"), str) or not entry["name"]:
        yield "model-index needs a name"
    for result in entry.get("results", []):
        for path in (("task", "type"), ("dataset", "type"), ("dataset", "name")):
            if not isinstance(result.get(path[0], {}).get(path[1]), str):
                yield f"a result of model-index lacks {'.'.join(path)}"
        metrics = result.get("metrics") or [{}]
        for metric in metrics:
            if not isinstance(metric.get("type"), str) or not isinstance(metric.get("value"), (int, float)):
                yield "a metric of model-index needs a type and a number"
