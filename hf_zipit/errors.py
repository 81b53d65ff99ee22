"""The exceptions a user can see: one sentence each, saying what was found, what was expected and what to do."""

from __future__ import annotations


class ZipItError(ValueError):
    """Base class of every error that hf_zipit raises on purpose: one sentence, fit to be shown without a traceback.

    It is one line, whatever it quotes: characters that move the cursor are written as Python writes them.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in sentence))


class ExpertError(ZipItError):
    """The experts cannot be merged with each other, or one of them is damaged."""


class DataError(ZipItError):
    """The calibration or evaluation data cannot be used."""


class SpecError(ZipItError):
    """A model could not be traced, or its merge spec does not cover it or does not prove."""


class RecipeError(ZipItError):
    """A recipe or a setting is wrong."""


class OutputError(ZipItError):
    """The result cannot be written where the user asked for it."""


class NameTakenError(ZipItError):
    """Two methods, rules, corrections or adapters have the same name."""


class OutOfMemoryError(ZipItError, MemoryError):
    """There is not enough memory, of the computer or of an accelerator."""


TOO_LARGE = "it ran out of memory; merge fewer or smaller experts, lower batch_size, or use a larger machine"


FULL = ("out of memory", "can't allocate memory", "not enough memory")
"""What torch calls it: accelerators, the CPU on Linux, the CPU on Windows."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; for some devices torch says so in a RuntimeError's text alone."""
    if isinstance(error, RuntimeError):
        return type(error).__name__ == "OutOfMemoryError" or any(words in str(error) for words in FULL)
    return isinstance(error, MemoryError)
