"""One of several processes of `test_run_in_processes.py`: runs a recipe as the command does."""

from __future__ import annotations

import os
import sys
from contextlib import redirect_stdout
from pathlib import Path

from accelerate import Accelerator

from hf_zipit.cli import main
from tests.docs_world import make_world

RUN = ["run", "recipe.yaml"]


def prepare(folder: Path) -> None:
    make_world(folder)


def work(accelerator: Accelerator, folder: Path) -> None:
    """What is printed goes to a file of each process."""
    os.chdir(folder)
    sys.argv = ["hf-zipit", *RUN, "--json", "--out", "out/2"]
    with Path(f"printed{accelerator.process_index}").open("w") as file, redirect_stdout(file):
        try:
            main()
        except SystemExit as end:
            assert not end.code
