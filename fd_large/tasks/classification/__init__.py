"""What tasks share that learn to name the class of an image: fine-tuning and the linear probe.

Labelled images of both splits, the feature of an image, the test and what it predicted, and a named
model in the place of a recipe's student.
"""
