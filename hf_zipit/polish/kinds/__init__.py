"""The kinds of training, one a file; each registers itself (`hf_zipit.polish.kind`)."""
