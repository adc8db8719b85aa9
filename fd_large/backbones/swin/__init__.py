"""Swin Transformer (first version), the architecture of EsViT's teacher."""
