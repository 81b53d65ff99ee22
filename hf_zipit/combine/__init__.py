"""Combining: the merged weights, from the experts' weights and their alignment. A rule is one file."""
