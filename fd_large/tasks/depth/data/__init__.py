"""Images with a depth for each pixel: datasets, and views for training and tests."""
