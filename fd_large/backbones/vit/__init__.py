"""Vision transformers: FD's students, and the CLIP, DINO, DeiT and BEiT teachers."""
