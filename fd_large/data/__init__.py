"""Images to batches: every sample is a function of (seed, epoch, position in the epoch)."""
