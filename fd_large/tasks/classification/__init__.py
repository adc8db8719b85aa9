"""Image classification: fine-tuning and the official linear probe.

In fine-tuning (`task.name finetune`) the whole student learns. In the linear probe (`linear`) a
norm and a linear layer learn on a frozen model, as in Feature-Distillation. The two tasks share the
code for labelled images, for an image's feature, for tests, and for trainings of a named model.
k-NN and quick linear probes of cached features are in `probes/`.
"""
