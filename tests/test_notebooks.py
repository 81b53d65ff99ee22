"""The notebooks of the docs were run as they stand, and run again where that is asked for (`make nightly`)."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_as_it_was_run(path: Path):
    book = json.loads(path.read_text(encoding="utf-8"))
    assert book["cells"][0]["cell_type"] == "markdown" and "".join(book["cells"][0]["source"]).startswith("# ")
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs and not any(output["output_type"] == "error" for output in outputs)
    for cell in cells:
        compile("".join(cell["source"]), path.name, "exec")


@pytest.mark.skipif("HF_ZIPIT_NIGHTLY" not in os.environ, reason="HF_ZIPIT_NIGHTLY is not set")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path):
    pytest.importorskip("nbclient")
    from benchmarks.notebooks import run

    run(Path(shutil.copy(path, tmp_path)))
