"""What is shared with the Hugging Face Hub: its files on this machine, and why it did not answer."""
