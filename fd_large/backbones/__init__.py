"""The backbones: one folder a family, and the layers that families share.

A family's folder holds all that is true of that family and of no other: `architecture.py` (fields,
checks and named models; no torch), the module, `published.py` (its published weights files),
`export.py` (what its models become elsewhere) and `family.py`, which gives all of it to the rest of
the package as a `Family`; `registry.py` lists the families, as
`recipes/architectures.py` does without torch: a new family is its folder and a line in each.

Every backbone is a Module with
    forward(images, keep) -> FeatureMap, drop path driven by the rows of `keep`;
    grid(height, width), the rows and columns of the map of an image;
    width, stride, num_prefix_tokens, of that map; drop_path_rates, one a row of `keep`;
    blocks(), in order of execution; layer_id(name) and last_layer, for learning rates by depth;
    no_weight_decay() and no_weight_decay_keywords();
and stages(images, keep), a map a stage, with stage_widths and stage_strides, if it has stages. A
model that only teaches does without those that training needs.

Nothing here reads files, knows tasks or calls torch.distributed.
"""
