"""Stored targets: a teacher's maps from a cache on disk, instead of the teacher itself."""
