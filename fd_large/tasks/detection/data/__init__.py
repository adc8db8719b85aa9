"""Images and their objects: from annotations in COCO's format to batches with targets."""
