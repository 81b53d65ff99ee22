"""Residues of tasks on top of a merged trunk: what is kept, of which tensors, within a budget of bytes."""
