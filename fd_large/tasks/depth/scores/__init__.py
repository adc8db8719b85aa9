"""The test of depth: views, scores, pictures and tables."""
