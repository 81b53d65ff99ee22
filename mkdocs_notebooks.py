"""A hook of mkdocs: the notebooks of the docs become pages while the site is built, with what they put out.

They are run by `make notebooks` and kept with their outputs: nothing is run here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

NOTE = "*A notebook, `docs/notebooks/{name}`, run by `make notebooks`; figures vary a little between machines.*"


def on_files(files: Files, config: Any) -> Files:
    """A page in place of every notebook."""
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        book = json.loads(Path(file.abs_src_path).read_text(encoding="utf-8"))
        name = file.src_uri.rpartition("/")[2]
        text = "\n\n".join([*parts(book), NOTE.format(name=name)])
        files.remove(file)
        files.append(File.generated(config, file.src_uri.replace(".ipynb", ".md"), content=text))
    return files


def parts(book: dict[str, Any]) -> Iterator[str]:
    """The cells as Markdown: texts as they are, code, and what it put out below it."""
    for cell in book["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            yield source
            continue
        yield f"```python\n{source}\n```"
        for output in cell["outputs"]:
            told = "".join(output.get("text") or output.get("data", {}).get("text/plain", ""))
            if told.strip():
                yield f"```text\n{told.rstrip()}\n```"
