"""The loss around two experts and their merge."""
