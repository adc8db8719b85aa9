"""Any backbone of timm, as a student or a teacher: one adapter, and what is seen of a model.

What is true of single models of timm is measured on them (`measure.py`), not listed here.
"""
