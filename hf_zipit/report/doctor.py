"""What works on this machine, and what to do about what does not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from rich.table import Table

from hf_zipit.extras import EXTRAS
from hf_zipit.report.tables import new_table
from hf_zipit.schema import Plain

EXTENSION = "~/.local/share/hf/extensions/hf-zipit/manifest.json"
"""What `hf extensions install OWNER/hf-zipit` writes."""


@dataclass(frozen=True)
class Check(Plain):
    """One finding: `remedy` says what to do where it is not good."""

    what: str
    found: str
    good: bool = True
    remedy: str = ""


def examine() -> list[Check]:
    """All checks, in the order in which a person would want to read them."""
    return [*_versions(), *_extras(), *_devices(), *_processes(), *_network()]


def _versions() -> Iterator[Check]:
    try:
        wanted = [line for line in requires("hf-zipit") or [] if "extra ==" not in line]
    except PackageNotFoundError:
        yield Check("hf-zipit", "not installed", False, "pip install -e . in the source tree, or pip install hf-zipit")
        return
    yield Check("hf-zipit", version("hf-zipit"))
    for requirement in map(Requirement, wanted):
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            yield Check(requirement.name, "missing", False, f"pip install '{requirement}'")
            continue
        good = requirement.specifier.contains(found, prereleases=True)
        yield Check(requirement.name, found, good, "" if good else f"pip install -U '{requirement}'")


def _devices() -> Iterator[Check]:
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append("Apple GPU (mps)")
    yield Check("devices", ", ".join(names) or "CPU only; everything works, large models are slow")
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    good = threads <= cores
    yield Check("threads", f"{threads} of {cores} cores", good, "" if good else f"set OMP_NUM_THREADS={cores} or less")


def _extras() -> Iterator[Check]:
    """Packages that only some things need: to be without one is not a fault."""
    for name, extra, purpose in EXTRAS.values():
        try:
            yield Check(name, version(name))
        except PackageNotFoundError:
            yield Check(name, f"not installed; needed only for {purpose}: pip install 'hf-zipit[{extra}]'")


def _processes() -> Iterator[Check]:
    import torch.distributed as distributed

    world = int(os.environ.get("WORLD_SIZE", "1"))
    # `accelerate launch --cpu --num_processes 2` runs one process without a word; torchrun runs two.
    hint = "for more: torchrun --nproc_per_node N -m hf_zipit.cli run RECIPE"
    yield Check("processes", f"{world}" if world > 1 else f"1; {hint}")
    able = distributed.is_available() and (distributed.is_gloo_available() or distributed.is_nccl_available())
    found = "gloo" if able and distributed.is_gloo_available() else "nccl" if able else "none"
    yield Check("process groups", found, able, "" if able else "install a build of torch with distributed support")


def _network() -> Iterator[Check]:
    from huggingface_hub import constants, get_token

    yield Check("Hub", "offline (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else constants.ENDPOINT)
    cache = Path(constants.HF_HUB_CACHE).expanduser()
    parent = next(folder for folder in (cache, *cache.parents) if folder.exists())
    writable = os.access(parent, os.W_OK)
    yield Check("Hub cache", str(cache), writable, "" if writable else "set HF_HOME to a folder that you may write to")
    extension = Path(EXTENSION).expanduser().is_file()
    yield Check("hf zipit", "yes" if extension else "no; hf-zipit does the same")
    yield Check(
        "Hub login", "yes" if get_token() else "no; needed only to push or to read private models: hf auth login"
    )


def checks_table(checks: list[Check]) -> Table:
    """The findings as a table for the terminal."""
    table = new_table("", ["", "what", "found", "what to do"], [])
    for check in checks:
        mark, style = ("ok", None) if check.good else ("!", "red")
        table.add_row(mark, check.what, check.found, check.remedy, style=style)
    return table
