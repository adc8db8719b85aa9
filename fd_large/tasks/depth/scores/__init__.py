"""The depth test: predictions of test images, scores, tables and plots."""
