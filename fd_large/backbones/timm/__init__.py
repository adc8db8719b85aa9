"""Adapts any backbone of timm as a student or a teacher.

The facts of a single model are measured on the model (`measure.py`), not listed here.
"""
