"""One file a pair or family of pairs: its data, its untrained models and its schedule."""
