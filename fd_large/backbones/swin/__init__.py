"""Swin Transformer, first version: EsViT's teacher."""
