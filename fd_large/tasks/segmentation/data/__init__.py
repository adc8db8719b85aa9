"""Images with a class for each pixel: datasets, labels, and views for training and tests."""
