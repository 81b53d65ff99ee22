"""What a person sees: tables on the terminal, pictures and the model card. Nothing here computes a result."""
