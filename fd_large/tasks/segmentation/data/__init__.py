"""Images with a class for each pixel: datasets, training views, batches."""
