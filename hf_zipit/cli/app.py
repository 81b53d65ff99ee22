"""The command line: `hf-zipit run`, `merge`, `evaluate` and so on, or `hf zipit run` as an extension of `hf`.

Results go to stdout, progress to stderr. Nobody should see a traceback for bad input or a wrong use: `EXIT_CODES` says
how a command ends. What takes seconds to import (torch, transformers) is imported inside the commands, so that the
help comes at once.
"""

from __future__ import annotations

from hf_zipit.cli.house import Commands

EXIT_CODES = {
    0: "done",
    1: "not possible; one sentence on stderr says why and what to do",
    2: "wrong use of the command, or a command without its arguments",
    130: "stopped by Ctrl-C; nothing is left behind",
}

app = Commands(
    help="Merge Hugging Face models of different tasks and initialisations into one model, without training.",
    epilog="\n".join(
        (
            "First steps",
            "  $ hf-zipit doctor",
            "  $ hf-zipit run recipes/quickstart.yaml",
            "  $ hf-zipit merge --help",
            "",
            "Exit codes",
            *(f"  {code:<5} {meaning}" for code, meaning in EXIT_CODES.items()),
            "",
            "Completion in the shell (bash; or zsh, fish)",
            '  $ eval "$(_HF_ZIPIT_COMPLETE=bash_source hf-zipit)"',
            "",
        )
    ),
)
