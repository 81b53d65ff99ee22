"""Seconds by stage of the merges that run inside a `with`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

from hf_zipit import merging

STAGES = (
    "plan",
    "moments_for",
    "align_trunk",
    "combined_trunk",
    "refit_trunk",
    "assemble",
    "calibrate_joint",
    "record",
)


@contextmanager
def timed_stages(clock: Callable[[], float]) -> Iterator[dict[str, float]]:
    """Seconds by stage, as a clock tells them; what one stage calls of another counts as its own."""
    seconds = dict.fromkeys(STAGES, 0.0)
    running: list[str] = []

    def timed(name: str, stage: Callable) -> Callable:
        def run(*args: object, **kwargs: object) -> object:
            start = clock()
            running.append(name)
            try:
                return stage(*args, **kwargs)
            finally:
                running.pop()
                if not running:
                    seconds[name] += clock() - start

        return run

    with ExitStack() as stack:
        for name in STAGES:
            stack.enter_context(patch.object(merging, name, timed(name, getattr(merging, name))))
        yield seconds
