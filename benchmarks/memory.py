"""How much memory this process holds, as Linux tells it. Imports nothing, so that a small process can ask, too."""

from __future__ import annotations

import sys
from pathlib import Path


def restart_peak() -> float | None:
    """The resident memory in MiB, from which the peak starts anew; None on systems that cannot tell (not Linux)."""
    if not sys.platform.startswith("linux"):
        return None
    Path("/proc/self/clear_refs").write_text("5")  # see proc(5): resets VmHWM to the current size
    return resident("VmRSS")


def resident(name: str) -> float:
    """A line of `/proc/self/status`, in MiB: `VmRSS` (now) or `VmHWM` (the peak)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) / 1024
