"""Recipes: their sections, their files, and the data and small experts that they name."""
