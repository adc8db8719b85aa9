"""Stores teachers' maps in a cache on disk, and reads the maps instead of running the teachers."""
