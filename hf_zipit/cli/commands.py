"""All commands at work: bad input is one sentence on stderr."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext

from rich.text import Text

from hf_zipit.cli import models, recipes  # noqa: F401 - they register their commands
from hf_zipit.cli.app import app
from hf_zipit.cli.printing import silence, stderr
from hf_zipit.errors import ZipItError

OUT_OF = {MemoryError: "memory; merge fewer or smaller experts, or lower batch_size", RecursionError: "nesting depth"}


def start() -> None:
    """Run the command that the script's arguments name. Of several processes the first one speaks."""
    try:
        with nullcontext() if int(os.environ.get("RANK", "0")) == 0 else silence():
            app("hf-zipit")
    except ZipItError as error:
        _end(str(error))
    except (MemoryError, RecursionError, OSError) as error:  # what no stage has a better sentence for
        reason = str(error) if isinstance(error, OSError) else f"it ran out of {OUT_OF[type(error)]}"
        _end(f"{reason.rstrip('.')}.")


def _end(sentence: str) -> None:
    stderr().print(Text(f"Error: {' '.join(sentence.split())}", style="red"), soft_wrap=True)
    sys.exit(1)
