"""Metrics of tasks with a class for each image; no torch."""

from __future__ import annotations

METRICS = {
    "loss": "cross-entropy",
    "test/loss": "test loss",
    "test/top1": "test top-1 accuracy (%)",
    "test/top5": "test top-5 accuracy (%)",
}
"""As `TrainingJob.metrics`."""
