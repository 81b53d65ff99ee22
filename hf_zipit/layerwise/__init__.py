"""Combining layer by layer: for rules that read what the merged model itself feeds into a layer."""
