"""Corrections of a merged model: what merging does to the statistics of its units, undone. A correction is a file."""
