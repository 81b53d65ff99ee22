"""The exceptions a user can see: one sentence each, saying what was found, what was expected and what to do."""

from __future__ import annotations


class ZipItError(ValueError):
    """Base class of every error that hf_zipit raises on purpose: one sentence, fit to be shown without a traceback."""


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
