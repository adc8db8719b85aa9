"""Heads that map a student's tokens to a teacher's width, used in training only."""
