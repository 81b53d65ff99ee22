"""Ctrl-C: a command ends at once, with exit code 130, and leaves nothing behind.

Python tells of a signal between two of its own steps, so that a `KeyboardInterrupt` waits for a factorisation that
takes ten seconds. A thread that the signal wakes directly gives the command a moment to end by itself; where it does
not, the thread removes what is temporary and ends the process. What is being saved stays what it was: see
`files/folder.py`.

This module imports the standard library alone: it is there before everything that takes time.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STOPPED = 130
"""The exit code: 128 and the number of the signal, as in every shell."""

GRACE = 1.0
"""Seconds in which a command may end by itself."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Runs a command inside; Ctrl-C is a SystemExit with `STOPPED`, and temporary files go in any case."""
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return
    room, before = tempfile.mkdtemp(prefix="hf_zipit-"), tempfile.tempdir
    tempfile.tempdir = room
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    ended = threading.Event()
    threading.Thread(target=_watch, args=(reader, room, ended), daemon=True).start()
    earlier = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        sys.exit(STOPPED)
    finally:
        ended.set()
        signal.set_wakeup_fd(earlier)
        os.close(writer)
        tempfile.tempdir = before
        shutil.rmtree(room, ignore_errors=True)


def _watch(reader: int, room: str, ended: threading.Event) -> None:
    """End the process when it was asked to stop and does not."""
    while number := os.read(reader, 1):
        if number[0] == signal.SIGINT and not ended.wait(GRACE):
            shutil.rmtree(room, ignore_errors=True)
            os.write(2, b"Stopped.\n")
            os._exit(STOPPED)
    os.close(reader)
