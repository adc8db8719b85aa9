"""Adapts any backbone of timm as a student or a teacher.

Facts of single models are measured on the models (`measure.py`), not listed.
"""
