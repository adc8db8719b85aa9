"""The paper's Table 1: models carried on to labels, segmentation, detection and depth.

A table of trainings: `columns.py` says of what, `cells.py` which model is trained on what,
`table.py` trains what is missing, `slurm.py` submits it as jobs. `report/transfer.py` draws it.
"""
