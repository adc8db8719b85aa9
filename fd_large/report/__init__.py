"""Draws plots and writes summaries and tables, from the files in a folder alone.

Importing this package does not import torch. Nothing here is specific to a task, since the labels
of metrics are stored in the run's folder (`TrainingJob.metrics`).
"""
