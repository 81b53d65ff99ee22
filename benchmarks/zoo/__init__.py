"""A small zoo of expert pairs trained from different initialisations on disjoint tasks.

    python -m benchmarks.zoo --out zoo                 # train every pair (minutes each, one core)
    pair = benchmarks.zoo.load("wordnet-bert", "zoo")  # the experts, their data and their score
    pair.score(pair.experts["a"], "a")                 # accuracy on task a's test split

The data come from public packages, every choice is seeded, and nothing here depends on merging: the zoo only trains,
saves and provides data. Every task has a train, a validation and a test split; settings are chosen on validation.
"""

from __future__ import annotations

from benchmarks.zoo.pair import Metric, Pair, Tensors
from benchmarks.zoo.store import build, load
from benchmarks.zoo.table import RECIPES

__all__ = ["RECIPES", "Metric", "Pair", "Tensors", "build", "load"]
