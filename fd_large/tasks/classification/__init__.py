"""Tasks that learn to name the class of an image: fine-tuning and the official linear probe.

In fine-tuning (`task.name finetune`) the whole student learns; in the probe (`linear`), as
Feature-Distillation makes it, a norm and one layer on a frozen model. They share labelled images of
both splits, the feature of an image, the test and what it predicted, and a named model in the place
of a recipe's student. k-NN and quick linear probes of cached features are in `probes/`.
"""
