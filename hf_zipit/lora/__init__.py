"""LoRA adapters of one base, merged in their factors: the update of a layer is never formed `[out, in]`."""
