"""Images with a depth for each pixel: datasets, training views."""
