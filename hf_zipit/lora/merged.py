"""The merged adapter: saved as PEFT loads it, or added to its base.

The update is the same for all tasks. What the experts keep whole (`modules_to_save`, mostly a classifier) stays every
task's own: then there is an adapter for each task, in a folder of its name, which differ in these modules alone.
"""

from __future__ import annotations

import copy
import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_zipit.errors import ExpertError, OutputError
from hf_zipit.experts.adapted import ADAPTER, adapter_config, is_adapted, load_adapted
from hf_zipit.files import adding_to, check_writable, write_text
from hf_zipit.files.places import folder_of
from hf_zipit.lora.adapter import FORMS, PREFIX, LoraAdapter
from hf_zipit.lora.factors import Factors
from hf_zipit.merging import merge

PASSED_ON = ("task_type", "auto_mapping", "revision", "fan_in_fan_out")
"""Settings that the merged adapter has from the experts'."""

LABELS = ("id2label", "label2id")


@dataclass(frozen=True, eq=False)
class MergedAdapters:
    """What `merge_adapters` returns.

    Attributes:
        updates: by layer the merged factors, B `[out, r]` and A `[r, in]`.
        adapters: the experts' adapters by task.
        settings: how they were merged, plain values.
        base: the base, as a model or by name; None: as the adapters name it.
    """

    updates: Mapping[str, Factors]
    adapters: Mapping[str, LoraAdapter]
    settings: Mapping[str, Any]
    base: PreTrainedModel | str | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.adapters)

    @property
    def has_heads(self) -> bool:
        """Whether tasks keep modules of their own, so that there is an adapter for each."""
        return any(adapter.kept for adapter in self.adapters.values())

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the adapter into a folder, or where tasks have heads one for each into folders of their names.

        `PeftModel.from_pretrained(base, folder)` loads it. Tensors are in float32.

        Raises:
            OutputError: the folder is neither absent nor empty, or cannot be written.
        """
        folder = check_writable(folder)
        if folder.is_dir() and any(folder.iterdir()):
            raise OutputError(f"The folder {folder} is not empty; name a new or empty folder for the adapter.")
        with adding_to(folder) as new:
            for task in self.tasks if self.has_heads else self.tasks[:1]:
                self._write(task, new / task if self.has_heads else new)
        return folder

    def expert(self, task: str) -> PreTrainedModel:
        """One task's full model: the base with the merged update and the task's own head, in eval mode.

        Raises:
            ExpertError: the base cannot be loaded, or has another head than the adapter.
        """
        adapter = self.adapters[task]
        if isinstance(self.base, nn.Module):
            start = copy.deepcopy(self.base)
        else:
            start = copy.deepcopy(adapter.source).unload() if is_adapted(adapter.source) else None
        with tempfile.TemporaryDirectory() as place:
            self._write(task, Path(place))
            if start is None:
                model = load_adapted(task, place, adapter_config(place) or {})
            else:
                from peft import PeftModel

                try:
                    model = PeftModel.from_pretrained(start, place).merge_and_unload(safe_merge=True)
                except RuntimeError as error:
                    raise ExpertError(
                        f"the adapter {task!r} does not fit the model that is given as base=; give the base's folder "
                        "or repo id, from which a head of the adapter's size is made"
                    ) from error
        model.name_or_path = "" if is_adapted(adapter.source) else str(adapter.source)
        return model.eval().requires_grad_(True)

    def model(self) -> PreTrainedModel:
        """The full weights: the base with the merged update; where tasks have heads, a model with all of them.

        Modules that tasks keep whole inside the trunk are averaged there. Raises ExpertError as `expert` does.
        """
        if not self.has_heads:
            return self.expert(self.tasks[0])
        found = merge({task: self.expert(task) for task in self.tasks}, method="identity")
        found.config.method["adapters"] = dict(self.settings)
        return found

    def _write(self, task: str, folder: Path) -> None:
        adapter = self.adapters[task]
        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = dict(adapter.kept)
        for layer, update in self.updates.items():
            form = next(own.forms[layer] for own in self.adapters.values() if layer in own.forms)
            first, second = FORMS[form.kind]
            ones = [1] * (len(form.inputs) - 1)
            update = update if update.rank else Factors(update.b.new_zeros(len(update.b), 1), _row_like(update))
            tensors[layer + first] = update.a.reshape(-1, *form.inputs)
            tensors[layer + second] = update.b.reshape(*update.b.shape, *ones)
        stored = {PREFIX + name: tensor.to(torch.float32).contiguous() for name, tensor in sorted(tensors.items())}
        save_file(stored, folder / ADAPTER, {"format": "pt"})
        self._config(adapter).save_pretrained(str(folder))
        source = None if isinstance(adapter.source, nn.Module) else folder_of(adapter.source)
        if isinstance(adapter.source, nn.Module) and adapter.kept:
            config = adapter.source.config.to_dict()
            labels = {name: config[name] for name in LABELS if config.get(name)}
            write_text(folder / "config.json", json.dumps(labels, indent=2) + "\n")
        elif source is not None and (source / "config.json").is_file():
            write_text(folder / "config.json", (source / "config.json").read_text(encoding="utf-8"))
        write_text(folder / "README.md", self._card(task))

    def _config(self, adapter: LoraAdapter) -> Any:
        from peft import LoraConfig

        ranks = {f"^{re.escape(layer)}": max(update.rank, 1) for layer, update in self.updates.items()}
        most = max(ranks.values())
        others = {layer: rank for layer, rank in ranks.items() if rank != most}
        return LoraConfig(
            r=most, lora_alpha=most, rank_pattern=others, alpha_pattern=dict(others), inference_mode=True,
            target_modules=sorted(self.updates), modules_to_save=adapter.config.get("modules_to_save") or None,
            base_model_name_or_path=self._base_name(adapter),
            **{name: adapter.config[name] for name in PASSED_ON if adapter.config.get(name)},
        )  # fmt: skip

    def _base_name(self, adapter: LoraAdapter) -> str | None:
        return getattr(self.base, "name_or_path", self.base) or adapter.base

    def _card(self, task: str) -> str:
        base = self._base_name(self.adapters[task])
        experts = [
            f"- {name}: {'a loaded model' if isinstance(own.source, nn.Module) else f'`{own.source}`'}"
            for name, own in self.adapters.items()
        ]
        about = "\n".join(f"- {name}: `{json.dumps(value)}`" for name, value in self.settings.items())
        named = f"base_model: {json.dumps(base)}\n" if base else ""
        whose = f" It has the modules that {task!r} keeps whole." if self.has_heads else ""
        listed = "\n".join(["Experts:\n", *experts, "\nSettings:\n", about])
        return (
            f"---\n{named}library_name: peft\ntags:\n- lora\n- merge\n- hf_zipit\n---\n\n# A merged adapter\n\n"
            f"LoRA adapters of one base, merged in their factors by hf_zipit, without training.{whose}\n\n{listed}\n"
        )


def _row_like(update: Factors) -> Tensor:
    return update.a.new_zeros(1, update.a.shape[1])
