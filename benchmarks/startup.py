"""What it costs to start: CPU seconds of `import hf_zipit` and of the command line's help, beside what they stand on.

    python -m benchmarks.startup [--repeats 5]

Every measurement is a fresh process, and the commands take turns, so that a busy machine is as busy for all of them.
CPU seconds, of the user and the system together, say more there than the clock; the best of the repeats counts. An
empty process is taken off, except for the command line, which is measured as a whole. Prints a table in Markdown, with
the ratios to `import torch` and `import transformers` of the same run.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from typing import Annotated

import typer

EMPTY, TORCH, TRANSFORMERS = "python -c pass", "import torch", "import transformers"

HELP = "import sys; from hf_zipit.cli import main; sys.argv = ['hf-zipit', *{!r}]; main()"

COMMANDS = {
    EMPTY: "pass",
    TORCH: TORCH,
    TRANSFORMERS: TRANSFORMERS,
    "import torch, transformers": "import torch, transformers",
    "import hf_zipit": "import hf_zipit",
    "import torch, hf_zipit": "import torch, hf_zipit",
    "import hf_zipit; hf_zipit.merge": "import hf_zipit; hf_zipit.merge",
    "hf-zipit --help": HELP.format(["--help"]),
    "hf-zipit merge --help": HELP.format(["merge", "--help"]),
}
"""What is measured, and the code that does it."""


def cpu_seconds(code: str) -> float:
    """CPU seconds of a fresh process that runs `code`, on one thread."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(repeats: int) -> dict[str, float]:
    """The best CPU seconds of every command; its first run, which may have to compile modules, does not count."""
    runs = [{name: cpu_seconds(code) for name, code in COMMANDS.items()} for _ in range(repeats + 1)]
    return {name: min(run[name] for run in runs[1:]) for name in COMMANDS}


def table(found: dict[str, float]) -> str:
    """The measurements in Markdown."""
    empty = found.pop(EMPTY)
    net = {name: seconds - (0 if name.startswith("hf-zipit") else empty) for name, seconds in found.items()}
    lines = [f"| | CPU seconds | of `{TORCH}` | of `{TRANSFORMERS}` |", "|---|---:|---:|---:|"]
    for name, seconds in net.items():
        ratios = (seconds / net[reference] for reference in (TORCH, TRANSFORMERS))
        lines.append(f"| `{name}` | {seconds:.2f} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")
    return "\n".join(lines)


def main(repeats: Annotated[int, typer.Option(help="Runs of every command.", min=1)] = 5) -> None:
    """Measure what starting costs."""
    print(table(measure(repeats)))


if __name__ == "__main__":
    typer.run(main)
