"""Hooks that watch a run (guard, watchdog, pre-emption, ...), trackers, the run's folder.

A hook may ask for a stop, a save, a skip or a roll-back and carries out none of them; the engine
does. Nothing here knows a task, a model or DeepSpeed, and hooks take plain arguments, no recipe.
"""
