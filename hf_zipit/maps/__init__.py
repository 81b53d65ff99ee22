"""The algebra of maps: merge and unmerge maps of spaces and of their products, and axes of tensors under them."""
