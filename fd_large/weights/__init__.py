"""Weights in and out of files, whatever the family.

`locate.py` turns a source into a file, `read.py` a file into tensors, `source.py` tensors into
those of a model (opened once a start), `settle.py` gives a recipe's section the model of its file,
and `coverage.py` sees to it that every tensor has its counterpart. `export.py` and `convert.py`
write.

No family's name is compared here, and no shape is written down: families say what their files are
(`backbones/NAME/published.py`), modules on the meta device say which shapes they have. Runs and
tasks are unknown here.
"""
