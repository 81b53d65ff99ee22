"""A copy of the source tree as it is published: its account filled in, and the README's links absolute, as PyPI needs.

python .ci/publishable.py --owner somebody --out build/tree
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACE = "OWNER"
"""What stands for the account in the repository."""


def absolute(text: str, owner: str) -> str:
    """Markdown whose links to files of the repository lead to it."""
    return re.sub(
        r"\]\((?!https?://|#|mailto:)([^)\s]+)\)", rf"](https://github.com/{owner}/hf-zipit/blob/main/\1)", text
    )


def publish(owner: str, out: Path) -> None:
    """Copy what git knows into `out`, which is emptied first."""
    shutil.rmtree(out, ignore_errors=True)
    for name in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, out / name)
    for name in ("pyproject.toml", "README.md", "CITATION.cff", "CHANGELOG.md"):
        text = (out / name).read_text(encoding="utf-8").replace(PLACE, owner)
        (out / name).write_text(absolute(text, owner) if name.endswith(".md") else text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--owner", default=PLACE)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    publish(arguments.owner, arguments.out)
