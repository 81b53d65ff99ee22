"""Searching for the settings that merge best: a space -> merges, scored on held-out data -> their frontier."""

from hf_zipit.searching.result import SearchResult, Trial
from hf_zipit.searching.space import Range, SearchSpace, Setting
from hf_zipit.searching.trials import search

__all__ = ["Range", "SearchResult", "Setting", "SearchSpace", "Trial", "search"]
