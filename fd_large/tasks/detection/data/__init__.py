"""Images with annotated objects in COCO's format, their random views, and batches with targets."""
