"""Runs work in a forked process that is killed at a chosen file event (opening, renaming, linking, ...) or moment.

Python reports each of these to its audit hooks, whoever calls it; killed before every one of them, the work passes
through every state that the folder has between two events. `HF_ZIPIT_FUZZ` asks for all of them.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

tqdm.set_lock(threading.RLock())  # the one it makes itself is shared with all forked processes, killed ones included

EVERYTHING = bool(os.environ.get("HF_ZIPIT_FUZZ"))
EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.chmod", "os.truncate")


def before_events(root: Path, do: Callable[[], object]) -> None:
    """From now on do something before every file event below `root`."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            path = os.fsdecode(arguments[0])
            if str(root) in path or not os.path.isabs(path):
                do()

    sys.addaudithook(hook)


def run(work: Callable[[], object], root: Path, kill_at: int | None = None) -> int | None:
    """The number of file events below `root` during the work; None if the process was killed at one of them."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        seen = 0

        def count() -> None:
            nonlocal seen
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

        before_events(root, count)
        try:
            work()
            os.write(writing, str(seen).encode())
        finally:
            os._exit(0)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reading) as pipe:
        told = pipe.read()
    if os.WIFSIGNALED(status):
        return None
    assert told, "the work itself failed"
    return int(told)


def steps(work: Callable[[], object], root: Path) -> Iterator[None]:
    """Does the work in a process of its own, which waits before every file event until the next step is asked for."""
    arrived, arrive = os.pipe()
    leave, left = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(left)  # with the parent gone, waiting ends

        def wait() -> None:
            os.write(arrive, b".")
            if not os.read(leave, 1):
                os._exit(1)

        before_events(root, wait)
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    os.close(arrive)
    os.close(leave)
    try:
        while os.read(arrived, 1):
            yield
            os.write(left, b".")
    finally:
        os.close(left)
        os.close(arrived)
        _, status = os.waitpid(child, 0)
    assert status == 0, "the work itself failed"


def told_by(work: Callable[[], Any]) -> Any:
    """What the work gives in a process of its own, as plain values; None if it fails."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as pipe:
        return json.loads(pipe.read() or "null")


def started(work: Callable[[], object]) -> int:
    """The id of a process that does the work and says nothing."""
    child = os.fork()
    if child == 0:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return child


def run_for(work: Callable[[], object], seconds: float | None = None) -> float | None:
    """How long the work took in a process of its own; None if it was killed after so many `seconds`."""
    start, child = time.monotonic(), started(work)
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert status == 0, "the work itself failed"
            return time.monotonic() - start
        if seconds is not None and time.monotonic() - start >= seconds:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            return None if os.WIFSIGNALED(status) else time.monotonic() - start
        time.sleep(0.002)


def points(count: int, some: int) -> Iterator[int]:
    """The events to be killed at: all, or `some` of them evenly."""
    return iter(range(count) if EVERYTHING else sorted({i * count // some for i in range(some)}))
