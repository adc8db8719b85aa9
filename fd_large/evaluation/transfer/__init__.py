"""The paper's Table 1, for which models train on for classification, segmentation and more.

`columns.py` defines the tasks and recipes, and `cells.py` the trainings of the table. `table.py`
runs the missing trainings, `slurm.py` submits them as jobs, and `report/transfer.py` draws the
table.
"""
