"""Weights in and out of files, whatever the family.

`resolve.py` is the one way from a source to weights, once a start: `download.py` finds its file,
`read.py` the tensors, `published.py` their format and model, `sidecar.py` what a configuration
beside them says. `settle.py` gives a recipe's section that model, and `coverage.py` sees to it that
every tensor has its counterpart. `export.py` and `convert.py` write.

No family's name is compared here, and no shape is written down: families say what their files are
(`backbones/NAME/published.py`), modules on the meta device say which shapes they have. Runs and
tasks are unknown here.
"""
