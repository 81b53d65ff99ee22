"""Running recipes: the whole of one, a search or a landscape of it, and the models that were saved."""
