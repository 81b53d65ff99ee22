"""The rules that merge adapters in their factors, one a file; each registers itself (`hf_zipit.lora.rule`)."""
