"""fd_large: feature distillation of vision backbones at up to three billion parameters."""

__version__ = "0.1.0"
