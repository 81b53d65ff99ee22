"""A merge written tensor by tensor is the merge made in memory, and holds next to nothing."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from hf_zipit.assembly import to_disk
from hf_zipit.errors import OutputError
from hf_zipit.files.tensors import half_precision, write_tensors
from hf_zipit.merging import merge
from tests import tiny


def saved(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> dict[str, str]:
    """Two experts in folders, in files of 20 kB."""
    for task, model in zip("ab", tiny.pair(name), strict=True):
        model.to(dtype).save_pretrained(folder / task, max_shard_size="20kB")
    return {task: str(folder / task) for task in "ab"}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("name", "dtype", "settings"),
    [
        ("llama", torch.bfloat16, {"method": "weights"}),
        ("llama", torch.bfloat16, {"method": "auto"}),
        ("gpt2", torch.float16, {"method": "weights"}),
        ("vit", torch.float32, {"method": "identity", "combine": "ties", "depth": 0.5}),
        ("resnet-basic", torch.float32, {"method": "weights"}),
        ("bert-masked", torch.float32, {"method": "identity", "combine": "dare"}),
    ],
)
def test_the_files_are_those_of_the_merge_in_memory(
    name: str, dtype: torch.dtype, settings: dict[str, Any], tmp_path: Path
):
    experts = saved(tmp_path, name, dtype)
    base = {"base": experts["a"]} if "combine" in settings else {}
    merge(experts, **settings, **base).save_pretrained(tmp_path / "memory" / "merged")
    found = merge(experts, output_dir=tmp_path / "disk" / "merged", **settings, **base)
    assert contents(tmp_path / "disk" / "merged") == contents(tmp_path / "memory" / "merged")
    assert not any(tensor.is_meta for tensor in (*found.parameters(), *found.buffers()))


def test_loaded_experts_are_written_in_shards_with_an_index(tmp_path, monkeypatch):
    experts = dict(zip("ab", tiny.pair("bert-sequence"), strict=True))
    expected = merge(experts, method="identity")
    monkeypatch.setattr(to_disk, "SHARD", "20kB")
    found = merge(experts, method="identity", output_dir=tmp_path / "merged")
    expected.save_pretrained(tmp_path / "expected", max_shard_size="20kB")
    own = {name: data for name, data in contents(tmp_path / "merged").items() if name.startswith("model")}
    assert len(own) > 3
    assert own == {
        n: data for n, data in contents(tmp_path / "expected").items() if n.startswith("model.") or n in own
    }
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, found.state_dict()[name])


def test_offloaded_experts_are_read_where_their_weights_are_kept(tmp_path):
    experts = saved(tmp_path, "llama")
    expected = merge(experts, method="weights").state_dict()
    in_memory, on_disk = (LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in experts.values())
    accelerate.cpu_offload(in_memory, execution_device=torch.device("cpu"))
    accelerate.disk_offload(on_disk, tmp_path / "kept", execution_device=torch.device("cpu"))
    found = merge({"a": in_memory, "b": on_disk}, method="weights").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert all(parameter.is_meta for parameter in (*in_memory.parameters(), *on_disk.parameters()))


MEASURED = """
import sys, threading
from pathlib import Path
from hf_zipit.merging import merge

def anonymous():
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

def watch():
    while not done.wait(0.001):
        peak[0] = max(peak[0], anonymous())

folder = Path(sys.argv[1])
experts = {task: folder / task for task in "ab"}
merge(experts, method="identity", output_dir=folder / "merged")  # imports, and what is traced is remembered
before, peak, done = anonymous(), [0], threading.Event()
thread = threading.Thread(target=watch)
thread.start()
merge(experts, method="identity", output_dir=folder / "merged")
done.set()
thread.join()
print(peak[0] - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
def test_memory_is_that_of_a_few_parts_of_tensors(tmp_path):
    """Two experts of 48 MiB each in bfloat16 become 128 MiB in float32; the largest tensors, two tables, 32 MiB."""
    config = LlamaConfig(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=2, num_attention_heads=8, vocab_size=1 << 14
    )
    expert = LlamaForCausalLM(config).to(torch.bfloat16)
    size = 4 * expert.num_parameters()
    for task in "ab":
        expert.save_pretrained(tmp_path / task, max_shard_size="30MB")
    # In a process of its own: what is free in the heap of a long one is in use without being needed. What is freed is
    # given back at once, for how much glibc keeps otherwise differs from run to run.
    own = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    found = subprocess.run(
        [sys.executable, "-c", MEASURED, tmp_path], capture_output=True, text=True, check=True, env=own
    )
    assert (tmp_path / "merged" / "model.safetensors").stat().st_size > size
    assert int(found.stdout.split()[-1]) < size / 6


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    experts = saved(tmp_path, "vit")
    merge(experts, method="identity", output_dir=tmp_path / "merged")
    before = contents(tmp_path / "merged")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(to_disk, "write_tensors", full)
    with pytest.raises(OutputError, match="No space left"):
        merge(experts, method="weights", output_dir=tmp_path / "merged")
    assert contents(tmp_path / "merged") == before


def test_a_file_has_the_bytes_that_safetensors_writes(tmp_path):
    tensors = {
        "ü": torch.randn(3, 2), "half": torch.randn(5).half(), "brain": torch.randn(2, 2).bfloat16(),
        "long": torch.arange(3), "bool": torch.tensor([True, False]), "none": torch.empty(0, 4),
        "one": torch.tensor(2.0), "byte": torch.arange(3, dtype=torch.uint8), "a": torch.randn(1),
        "wide": torch.randn(2, dtype=torch.float64),
    }  # fmt: skip
    save_file(tensors, tmp_path / "expected", metadata={"format": "pt"})
    like = {name: tensor.to("meta") for name, tensor in tensors.items()}
    pieces = {name: tensor.split(1) if tensor.dim() else [tensor] for name, tensor in tensors.items()}
    for given in (pieces, {name: [tensor] for name, tensor in tensors.items()}):
        write_tensors(tmp_path / "found", like, given.__getitem__)
        assert (tmp_path / "found").read_bytes() == (tmp_path / "expected").read_bytes()
    for wrong in (tensors["ü"][1:], tensors["ü"].T):
        with pytest.raises(ValueError, match="the tensor ü"):
            write_tensors(tmp_path / "found", {"ü": like["ü"]}, {"ü": [wrong]}.__getitem__)


def test_weights_of_several_precisions_are_no_half_precision(tmp_path):
    half, whole = torch.ones(2).half(), torch.ones(2)
    for tensors, expected in (({"a": half, "n": torch.arange(2)}, torch.float16), ({"a": half, "b": whole}, None)):
        save_file(tensors, tmp_path / "model.safetensors")
        assert half_precision(tmp_path) == expected
