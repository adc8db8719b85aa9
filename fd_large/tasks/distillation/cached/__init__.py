"""Stores a teacher's maps in a cache on disk, and reads them in place of running the teacher."""
