"""The official COCO evaluation of detections, with its result files, tables and plots."""
