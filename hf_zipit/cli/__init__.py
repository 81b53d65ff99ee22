"""The command line: `app.py` is the script, `models.py` and `recipes.py` are its commands."""

from hf_zipit.cli import models, recipes  # noqa: F401 - they register their commands
from hf_zipit.cli.app import app, main

__all__ = ["app", "main"]
