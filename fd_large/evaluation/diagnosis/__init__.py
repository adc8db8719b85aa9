"""Diagnosis of models side by side: attention, loss landscape, CKA.

Figures are computed here; plots and the page are drawn by `report/` from the files that
`examine.py` writes.
"""
