"""Alignment: which units of the experts, and of one expert, are similar.

A method is one file, a pure function registered under its name (`registry.py`); `align` runs it on every space.
"""
