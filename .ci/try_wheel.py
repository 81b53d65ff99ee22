"""Whether the installed package works with nothing beside its dependencies: merge, save with card, load, inspect."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

import hf_zipit

assert "site-packages" in hf_zipit.__file__, f"{hf_zipit.__file__} is not the installed package"
size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
config = ViTConfig(**size, image_size=8, patch_size=4, num_channels=1)
with tempfile.TemporaryDirectory() as room:
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        ViTForImageClassification(config).save_pretrained(Path(room, name))
    pixels = torch.randn(16, 1, 8, 8)
    merged = hf_zipit.merge([f"{room}/a", f"{room}/b"], pixels)
    merged.save_pretrained(f"{room}/m")
    again = AutoModelForImageClassification.from_pretrained(f"{room}/m")
    assert torch.equal(again(pixel_values=pixels).logits, merged(pixel_values=pixels).logits)
    assert Path(room, "m", "README.md").is_file()
    script = Path(sys.executable).with_name("hf-zipit")
    told = subprocess.run([script, "inspect", f"{room}/m", "--quiet"], capture_output=True, text=True, check=True)
    assert "shared by all" in told.stdout
print(f"hf-zipit {version('hf-zipit')} works on Python {sys.version.split()[0]}")
