"""Models of the user's own: their contract, and how the user's code is called."""
