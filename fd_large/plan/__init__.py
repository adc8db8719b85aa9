"""Arithmetic of a run: parameters and memory are counted here and nowhere else. No torch."""
