"""The command line: `hf-zipit run`, `merge`, `evaluate` and so on, or `hf zipit run` as an extension of `hf`.

Results go to stdout, progress to stderr. Bad input is told in one sentence and ends with exit code 1, a wrong use of
the command with 2; nobody should see a traceback for either. What takes seconds to import (torch, transformers) is
imported inside the commands, so that the help comes at once.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext

from rich.text import Text

from hf_zipit.cli.house import Commands
from hf_zipit.cli.printing import silence, stderr
from hf_zipit.errors import TOO_LARGE, ZipItError, is_out_of_memory

app = Commands(
    help="Merge Hugging Face models of different tasks and initialisations into one model, without training.",
    epilog="""First steps
  $ hf-zipit doctor
  $ hf-zipit run recipes/quickstart.yaml
  $ hf-zipit merge --help
""",
)


def main() -> None:
    """The console script. Of several processes the first one speaks."""
    try:
        with nullcontext() if int(os.environ.get("RANK", "0")) == 0 else silence():
            app("hf-zipit")
    except (ZipItError, MemoryError, RuntimeError, OSError) as error:
        if not (isinstance(error, (ZipItError, RecursionError, OSError)) or is_out_of_memory(error)):
            raise  # a mistake of ours, whose traceback is wanted
        told = TOO_LARGE if is_out_of_memory(error) and not isinstance(error, ZipItError) else str(error)
        stderr().print(Text(f"Error: {' '.join(told.split())}", style="red"), soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        stderr().print("Stopped.", style="red")
        sys.exit(130)
