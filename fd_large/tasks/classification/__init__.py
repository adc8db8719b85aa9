"""Image classification: fine-tuning and the official linear probe.

In fine-tuning (`task.name finetune`) the whole student learns. In the probe (`linear`) a norm and
one layer learn on a frozen model, as in Feature-Distillation. Both share the code for labelled
images, for the feature of an image, for the test with its predictions, and for replacing a recipe's
student by a named model. k-NN and quick linear probes of cached features are in `probes/`.
"""
