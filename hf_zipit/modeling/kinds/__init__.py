"""The kinds of residues, one a file: see `hf_zipit.modeling.residue`."""
