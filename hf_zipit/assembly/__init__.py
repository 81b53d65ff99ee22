"""Merged tensors become a Hugging Face model; and which of its layers may be wider than an expert's."""
