"""Image classification: fine-tuning and the official linear probe.

In fine-tuning (`task.name finetune`) the whole student learns; in the probe (`linear`), as in
Feature-Distillation, a norm and one layer on a frozen model. Both share labelled images of both
splits, the feature of an image, the test with its predictions, and the replacement of a recipe's
student by a named model. k-NN and quick linear probes of cached features are in `probes/`.
"""
