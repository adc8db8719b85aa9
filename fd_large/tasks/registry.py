"""Which room carries out a recipe's task; the rooms are imported as they are needed."""

from __future__ import annotations

from fd_large.engine.job import Job
from fd_large.recipes.run import Run


def job_of(run: Run) -> Job:
    """Returns what the run's task brings to the engine."""
    if run.task.name == "finetune":
        from fd_large.tasks.finetuning.job import FineTuningJob

        return FineTuningJob(run)
    if run.task.name == "detection":
        from fd_large.tasks.detection.job import DetectionJob

        return DetectionJob(run)
    if run.eval.knn_root:
        from fd_large.tasks.distillation.watched import WatchedDistillation

        return WatchedDistillation(run)
    from fd_large.tasks.distillation.job import DistillationJob

    return DistillationJob(run)
