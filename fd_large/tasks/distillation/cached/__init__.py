"""Stored targets: maps of a teacher that a cache holds, in the place of the teacher."""
