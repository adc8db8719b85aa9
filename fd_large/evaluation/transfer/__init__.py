"""The paper's Table 1: models trained on for classification, segmentation, detection and depth.

A table of trainings: `columns.py` defines tasks and recipes, `cells.py` the trainings, `table.py`
runs the missing ones, `slurm.py` submits them as jobs. `report/transfer.py` draws the table.
"""
