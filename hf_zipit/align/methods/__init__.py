"""The alignment methods, one a file; each registers itself (`hf_zipit.align.method`)."""
