"""The test of a depth: views, scores, pictures and tables."""
