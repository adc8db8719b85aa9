"""Recipes: their sections, the table of named models, and the runs of record.

No torch and nothing that computes: `--help` imports this room and must not wait.
"""
