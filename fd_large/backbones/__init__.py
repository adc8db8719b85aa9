"""Backbones of all families: a folder for each family, and files of layers that families share.

A family's folder holds everything specific to the family: `architecture.py` (fields,
checks and named models; no torch), the module, `published.py` (its published weights files),
`export.py` (its models in other libraries) and `family.py`, which presents them to the rest of
the package as a `Family`. `registry.py` lists the families, and so does
`recipes/architectures.py`, without torch: a new family is its folder and a line in each.

Every backbone is a Module with
    forward(images, keep) -> FeatureMap, drop path driven by the rows of `keep`;
    grid(height, width), the rows and columns of the map of an image;
    width, stride, num_prefix_tokens, of that map; drop_path_rates, one a row of `keep`;
    blocks(), in order of execution; layer_id(name) and last_layer, for learning rates by depth;
    outside_blocks(), modules of blocks that are called outside of the blocks' forwards;
    no_weight_decay() and no_weight_decay_keywords();
and, if it has stages, stages(images, keep), which returns a map of each stage, with stage_widths
and stage_strides. A model used only as a teacher needs no methods for training.

Nothing here knows tasks or calls torch.distributed itself: batch norms and downloads use
`fd_large.ranks`. `weights/` opens weights files; only libraries read or write files of their own.
"""
