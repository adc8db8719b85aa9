"""The formats that `export --to` can write; this file does not import torch."""

from __future__ import annotations

from typing import Literal, NamedTuple

To = Literal["timm", "hf", "fd", "mmseg", "upernet", "onnx", "program"]


class Library(NamedTuple):
    """A format that `export` writes, and the library that loads it.

    Attributes:
        package: The library that loads the files, as Hugging Face names it on model cards.
        holds: Contents of the files in words, for messages.
        graph: Name of the file with the traced model and its weights; empty if the files hold
            tensors for a model of the library.
        heads: Whether the files also hold a task's heads; then runs without heads cannot be
            exported.
    """

    package: str
    holds: str
    graph: str = ""
    heads: bool = False


LIBRARIES: dict[To, Library] = {
    "timm": Library("timm", "a model of timm"),
    "hf": Library("transformers", "a model of transformers"),
    "fd": Library("fd_large", "the names of the Feature-Distillation repository"),
    "mmseg": Library("mmsegmentation", "a segmentation model of mmsegmentation", heads=True),
    "upernet": Library("transformers", "a segmentation model of transformers", heads=True),
    "onnx": Library("onnx", "an ONNX graph", graph="model.onnx"),
    "program": Library("pytorch", "a torch.export program", graph="model.pt2"),
}
