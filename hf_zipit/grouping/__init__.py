"""Which experts to merge with which."""
