"""The official COCO evaluation of detections, its files, and plots of errors."""
