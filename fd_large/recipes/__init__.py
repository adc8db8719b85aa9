"""Recipes, with their sections, the table of named models and the published runs.

Nothing here imports torch or takes long to import, since `--help` imports this package.
"""
