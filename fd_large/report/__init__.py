"""Plots, summary and tables, from the files in a folder alone; no torch at import.

It knows no task: the labels of metrics are stored in the run's folder (`TrainingJob.metrics`).
"""
