"""Fine-tuning: the whole student learns to classify images.

Here live the classifier, RandAugment, mixing, the training views, and the recipe that a named model
is fine-tuned with. k-NN and linear probes of frozen features live in `probes/`.
"""
