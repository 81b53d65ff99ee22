"""Programs that merge from files to files, each in a process of its own, with its time and memory.

hf_zipit, and beside it mergekit and sentence-transformers in environments of their own: one program is a Python and
a few lines that define `merge(settings)`. Anonymous memory (`RssAnon`: what cannot be dropped and read again from a
file) is sampled from outside, every few milliseconds.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCALE = 0.4
"""What task arithmetic multiplies task vectors by, the default of `task-arithmetic`."""

AROUND = """
import json, sys, time
started = time.perf_counter()
import torch
{code}
torch.set_num_threads(1)
anonymous = next(int(l.split()[1]) // 1024 for l in open("/proc/self/status") if l.startswith("RssAnon"))
imported = time.perf_counter() - started
for settings in json.load(sys.stdin):
    begun, cpu, error = time.perf_counter(), time.process_time(), None
    try:
        merge(settings)
    except Exception as found:
        error = f"{{type(found).__name__}}: {{found}}"
    print("\\n" + json.dumps(dict(
        import_seconds=imported, import_mib=anonymous, error=error,
        seconds=time.perf_counter() - begun, cpu_seconds=time.process_time() - cpu,
    )), flush=True)
"""

HF_ZIPIT = """
import transformers
from hf_zipit import merging
import hf_zipit.modeling.heads, hf_zipit.combine.rules, hf_zipit.align.methods
transformers.utils.logging.disable_progress_bar()

def merge(settings):
    merging.merge(**settings)
"""
"""Settings are the arguments of `merge`."""

MERGEKIT = """
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

def merge(settings):
    options = MergeOptions(copy_tokenizer=False, quiet=True)
    run_merge(MergeConfiguration.model_validate(settings["config"]), settings["output_dir"], options)
"""
"""Settings are the `config` that its YAML files hold, and the folder."""

SENTENCE_TRANSFORMERS = """
import transformers
from sentence_transformers import SentenceTransformer
import mergekit.merge_methods
transformers.utils.logging.disable_progress_bar()

def merge(settings):
    folder = settings.pop("output_dir")
    SentenceTransformer.merge(**settings).save_pretrained(folder)
"""
"""Settings are the arguments of `SentenceTransformer.merge`."""


@dataclass(frozen=True)
class Program:
    """What merges: the code that defines `merge(settings)`, and the Python of its environment."""

    code: str
    python: str = sys.executable

    def versions(self, *packages: str) -> str:
        """The versions of packages in its environment, in words."""
        code = "import sys; from importlib.metadata import version; print(*(version(p) for p in sys.argv[1:]))"
        told = subprocess.run([self.python, "-c", code, *packages], capture_output=True, text=True, check=True).stdout
        return ", ".join(f"{name} {number}" for name, number in zip(packages, told.split(), strict=True))

    def run(self, merges: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Merge in one process, one after the other.

        Returns:
            For every one of the settings `seconds`, `cpu_seconds`, the `import_seconds` before, the `import_mib` that
            imports hold, `peak_mib` of the whole process, and the `error` in words, None where there was none.

        Raises:
            SystemExit: the process ended before the last one was done.
        """
        with tempfile.TemporaryFile("w+") as given, tempfile.TemporaryFile("w+") as told:
            json.dump([dict(settings) for settings in merges], given)
            given.seek(0)
            child = subprocess.Popen(
                [self.python, "-W", "ignore", "-c", AROUND.format(code=self.code)], stdin=given, stdout=told
            )
            peak = 0
            while child.poll() is None:
                peak = max(peak, anonymous_mib(child.pid))
                time.sleep(0.005)
            told.seek(0)
            found = [json.loads(line) for line in told if line.startswith('{"import_seconds"')]
        if len(found) < len(merges):
            raise SystemExit(f"the merge {dict(merges[len(found)])} ended its process")
        return [{**one, "peak_mib": peak} for one in found]


def anonymous_mib(process: int) -> int:
    """The anonymous memory of a process, 0 where it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return max((int(line.split()[1]) // 1024 for line in lines if line.startswith("RssAnon")), default=0)
