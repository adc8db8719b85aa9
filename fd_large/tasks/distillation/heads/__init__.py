"""Heads that map a student's tokens to a teacher's width; they are no part of the student."""
