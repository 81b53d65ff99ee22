"""The combining rules, one a file; each registers itself (`hf_zipit.combine.rule`)."""
