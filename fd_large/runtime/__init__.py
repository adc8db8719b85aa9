"""Hooks around a run: they observe it and ask it to save or stop, and know nothing of how."""
