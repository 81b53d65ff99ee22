"""The experts: loaded, adapters made plain, and where they came from."""
