"""Hooks that watch a run (guard, watchdog, pre-emption, ...), trackers, the run's folder.

A hook may request a stop, a save, a skip or a roll-back, which the engine carries out. This room
knows no task, model or DeepSpeed, and hooks take plain arguments instead of a recipe.
"""
