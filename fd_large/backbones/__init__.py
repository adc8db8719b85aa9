"""Backbones of all families: a folder for each family, and files of layers that families share.

A family's folder holds everything specific to the family: `architecture.py` (fields, checks and
named models; no torch), the module, `published.py` (published weights files), `export.py` (exports
to other libraries) and `family.py`, which describes the family to the rest of the package as a
`Family`. A new family needs its folder, a line in `registry.py`, and a line in
`recipes/architectures.py`, which lists the families without torch.

Every backbone is a Module with
    forward(images, keep) -> FeatureMap, where `keep` says which branches drop path keeps;
    grid(height, width), the rows and columns of the map of an image;
    width, stride and num_prefix_tokens of the map;
    drop_path_rates, the drop rate of each row of `keep`;
    blocks(), in order of execution;
    layer_id(name) and last_layer, for layer-wise learning rates;
    outside_blocks(), modules inside blocks that the blocks' own forwards do not call;
    no_weight_decay(), names of the parameters that get no weight decay;
    no_weight_decay_keywords(), substrings that mark names of further such parameters;
and, if it has stages, stages(images, keep), which returns the map of each stage, stage_widths and
stage_strides. A model used only as a teacher needs no methods for training.

No code here knows tasks or calls torch.distributed itself: batch norms and downloads use
`fd_large.ranks`. `weights/` opens weights files, except those that a library (timm, transformers,
open_clip) reads or writes itself.
"""
