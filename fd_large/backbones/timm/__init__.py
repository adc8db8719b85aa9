"""Any backbone of timm, as a student or a teacher: one adapter, and facts measured on a model.

Facts of single timm models are measured on them (`measure.py`), not listed here.
"""
