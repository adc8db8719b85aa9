"""The paper's Table 1: models that are trained and tested on one labelled task after another.

`columns.py` defines the tasks and recipes, and `cells.py` the trainings of the table. `table.py`
runs the missing trainings, `slurm.py` submits them as jobs, and `report/transfer.py` draws the
table.
"""
