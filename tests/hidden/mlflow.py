"""Hides MLflow from DeepSpeed's launcher, both of whose processes would take seconds for it."""

raise ImportError
