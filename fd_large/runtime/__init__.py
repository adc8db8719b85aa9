"""Hooks that watch a run (guard, watchdog, pre-emption, ...), trackers, and the run's folder.

A hook may request a stop, a checkpoint, a skipped step or a roll-back, which the engine carries
out. This package imports no task, model or DeepSpeed, and hooks take plain arguments instead of a
recipe.
"""
