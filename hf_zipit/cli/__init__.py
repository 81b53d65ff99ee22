"""The command line: `main` is the script, `models.py` and `recipes.py` are its commands."""

from hf_zipit.cli.stopping import stoppable

__all__ = ["main"]


def main() -> None:
    """The console script; nothing that takes time is imported before it can be stopped."""
    with stoppable():
        from hf_zipit.cli.commands import start

        start()
