"""Models of the user's own, as teachers."""
