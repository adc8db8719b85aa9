"""The segmentation test: predictions by windows and at several scales, scores, tables and plots."""
