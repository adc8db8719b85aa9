"""Pictures, summary and tables, from the files in a folder alone; no torch at import.

It knows no task: what the numbers are called stands in the run's folder (`TrainingJob.metrics`).
"""
