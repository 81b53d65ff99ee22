"""What holds for all tests: no progress bars; what was traced once stays known, as nearly all of them merge alike; few
samples are made where few are given.
"""

from __future__ import annotations

import gc

from transformers.utils import logging

from hf_zipit.data import written
from hf_zipit.symmetry import memory

from .processes import in_two_processes  # noqa: F401  # a fixture


def pytest_collection_finish() -> None:
    """What was imported and collected stays: garbage collection need not look at it again and again."""
    gc.collect()
    gc.freeze()


logging.disable_progress_bar()
memory.REMEMBERED = 300
written.TOKENS = 2**8
