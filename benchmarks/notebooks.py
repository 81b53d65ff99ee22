"""Run the notebooks of the docs and keep what they put out: `python -m benchmarks.notebooks`, or `make notebooks`.

A cell that fails ends it with 1. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path("docs/notebooks")
NOISE = re.compile(r"^.*(it/s|batch/s|module/s|examples/s)\].*$|\x1b\[[0-9;]*[A-Za-z]", re.MULTILINE)
QUIET = {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}


def run(path: Path) -> None:
    """Execute a notebook in an empty folder, and keep what it put out; raises CellExecutionError if a cell fails."""
    import os

    import nbformat
    from nbclient import NotebookClient

    os.environ |= QUIET
    book = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as room:
        place = {"metadata": {"path": room}}
        NotebookClient(book, timeout=600, kernel_name="python3", resources=place).execute()
    for cell in book.cells:
        cell.metadata.clear()  # when it ran
        if cell.cell_type == "code":
            cell.outputs = joined([output for output in map(cleaned, cell.outputs) if output is not None])
    path.write_text(json.dumps(book, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def cleaned(output: dict[str, Any]) -> dict[str, Any] | None:
    """An output without progress bars; None where nothing is left, and for what was written on stderr."""
    if output.get("name") == "stderr":
        return None
    if "text" in output:
        output["text"] = NOISE.sub("", output["text"])
        return output if output["text"].strip() else None
    return output


def joined(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was printed in pieces as one text."""
    found: list[dict[str, Any]] = []
    for output in outputs:
        if found and "text" in output and "text" in found[-1]:
            found[-1]["text"] += output["text"]
        else:
            found.append(output)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(FOLDER.glob("*.ipynb")))
    for path in parser.parse_args().notebooks:
        print(path, flush=True)
        run(path)


if __name__ == "__main__":
    main()
