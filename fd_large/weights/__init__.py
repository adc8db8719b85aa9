"""Reads and writes weights files, for every family of models.

All code gets the weights of a source from `resolve.py`, which resolves each source once in a launch
of a command. For this `download.py` finds the file, `read.py` opens its tensors, `published.py`
finds their format and model, and `sidecar.py` reads the configuration next to the file. `settle.py`
fills a recipe's section with the model that the weights show. `coverage.py` checks that file and
model have the same tensors. `export.py` and `convert.py` write weights.

No code here depends on a family's name or states a shape: families describe their files
(`backbones/NAME/published.py`), and modules on the meta device give the shapes. No code here knows
runs or tasks. An argument `where` is always the field or flag that the user set, or the command,
with which messages begin.
"""
