"""Vision transformers: Feature-Distillation's students, and CLIP, DINO, DeiT and BEiT teachers."""
