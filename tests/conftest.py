"""What holds for all tests: no progress bars."""

from __future__ import annotations

from transformers.utils import logging

logging.disable_progress_bar()
