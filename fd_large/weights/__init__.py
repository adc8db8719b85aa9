"""Reading and writing of weights files, for every family of models.

`resolve.py` is the only way from a source to weights, and resolves each source once a start:
`download.py` finds the file, `read.py` the tensors, `published.py` their format and model, and
`sidecar.py` the configuration next to them. `settle.py` puts the model into a recipe's section,
and `coverage.py` checks that every tensor has its counterpart. `export.py` and `convert.py` write.

No family's name is compared here, and no shape is written down: families describe their files
(`backbones/NAME/published.py`), and modules on the meta device give the shapes. This room does
not know runs and tasks.
"""
