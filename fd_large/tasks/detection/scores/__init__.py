"""The official COCO evaluation of detections, their files, and pictures of what went wrong."""
