"""All commands at work: bad input is one sentence on stderr."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext

from rich.text import Text

from hf_zipit.cli import adapters, grouping, models, recipes  # noqa: F401 - they register their commands
from hf_zipit.cli.app import app
from hf_zipit.cli.printing import silence, stderr
from hf_zipit.errors import TOO_LARGE, ZipItError, is_out_of_memory


def start() -> None:
    """Run the command that the script's arguments name. Of several processes the first one speaks."""
    try:
        with nullcontext() if int(os.environ.get("RANK", "0")) == 0 else silence():
            app("hf-zipit")
    except (ZipItError, MemoryError, RuntimeError, OSError) as error:
        if not (isinstance(error, (ZipItError, RecursionError, OSError)) or is_out_of_memory(error)):
            raise  # a mistake of ours, whose traceback is wanted
        _end(TOO_LARGE if is_out_of_memory(error) and not isinstance(error, ZipItError) else str(error))


def _end(sentence: str) -> None:
    stderr().print(Text(f"Error: {' '.join(sentence.split())}", style="red"), soft_wrap=True)
    sys.exit(1)
