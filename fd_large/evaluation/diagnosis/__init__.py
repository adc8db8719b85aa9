"""Diagnosis of models side by side, by attention, loss landscape and CKA.

This package computes the numbers. `report/` draws the plots and the page from the files that
`examine.py` writes.
"""
