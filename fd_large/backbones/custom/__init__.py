"""The user's own models: their contract, and calls of the user's code."""
