"""The one table of published formats: how each is told from its names, and who translates it.

Pure functions of names and tensors, but for `read_weights`, which opens a file by `read.py` and
sends it through the table. A live net takes its tensors from the engine. Our own files use the
names of the nets themselves, which are the official repositories', and pass through the same table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fd_large.errors import WeightsError, nearest
from fd_large.weights import swin, vit
from fd_large.weights.read import read

Names = frozenset[str]


@dataclass(frozen=True)
class Format:
    """A layout of names.

    Attributes:
        tell_tale: Whether a set of names is of this format; the table's first match counts.
        translate: One (name, tensor) to ours; None drops it on purpose.
        what: In words, for messages.
    """

    tell_tale: Callable[[Names], bool]
    translate: Callable[[str, Tensor], tuple[str, Tensor] | None]
    what: str


def _any(names: Names, *pieces: str) -> bool:
    return any(all(piece in name for piece in pieces) for name in names)


def _timm_swin(names: Names) -> bool:
    # timm merges at the start of a stage: the first stage then has no downsample, the second has.
    return _any(names, "layers.1.downsample.") and not _any(names, "layers.0.downsample.")


FORMATS: dict[str, Format] = {
    "openai_clip": Format(
        lambda n: "visual.conv1.weight" in n, vit.openai_clip, "OpenAI CLIP's image tower"
    ),
    "fd_swinv2": Format(
        lambda n: _any(n, ".rpe_mlp."), swin.fd_swinv2, "Feature-Distillation SwinV2 student"
    ),
    "fd_vit": Format(
        lambda n: not n.isdisjoint({"encoder.blocks.0.attn.q_bias", "blocks.0.attn.q_bias"}),
        vit.fd_vit,
        "Feature-Distillation ViT student",
    ),
    "swinv2": Format(
        lambda n: _any(n, ".cpb_mlp.") and not _timm_swin(n),
        swin.official_swinv2,
        "Swin-Transformer's SwinV2",
    ),
    "swin": Format(
        lambda n: _any(n, "layers.", ".relative_position_bias_table") and not _timm_swin(n),
        swin.swin_v1,
        "Swin V1 (Swin-Transformer, EsViT)",
    ),
    "vit": Format(
        lambda n: "blocks.0.attn.qkv.bias" in n and "patch_embed.proj.weight" in n,
        vit.plain_vit,
        "DINO, DeiT or timm ViT",
    ),
}


def detect(names: Iterable[str], *, where: str = "weights") -> str:
    """Returns the format's name.

    Raises: WeightsError: if the names are of no format in the table.
    """
    names = frozenset(names)
    if not _any(names, "mask_token"):  # SimMIM's encoders hold one; their reader is another's.
        for name, form in FORMATS.items():
            if form.tell_tale(names):
                return name
    known = "; ".join(form.what for form in FORMATS.values())
    raise WeightsError(
        f"{where}: names of no known format; got {', '.join(sorted(names)[:5])}, ..., expected one "
        f"of: {known}. Convert the file, or rename its tensors to the net's own names."
    )


def translate(form: str, items: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yields (our name, tensor) for every tensor that is not dropped on purpose.

    The projection of a student's file comes as `projection.weight` (Ct, Cs) and `projection.bias`.

    Raises: WeightsError: if there is no such format.
    """
    if form not in FORMATS:
        raise WeightsError(
            f"weights: no such format; got {form!r}, {nearest(form, FORMATS)}. Use one of these."
        )
    for name, tensor in items:
        item = FORMATS[form].translate(name, tensor)
        if item is not None:
            yield item


def covered(
    expected: Mapping[str, tuple[int, ...]], items: Iterable[tuple[str, Tensor]], *, where: str
) -> Iterator[tuple[str, Tensor]]:
    """Passes tensors on one by one and checks that they and the net's are the same set.

    Args:
        expected: Shape of every parameter of the net.
        items: (name, tensor) in our names.
        where: What the user set, for the message.

    Raises: WeightsError: after the last tensor, naming what was missing, left over, given twice or
        of another shape; only fitting ones are passed on.
    """
    seen: set[str] = set()
    left_over, misfits, twice = [], [], []
    for name, tensor in items:
        if name not in expected:
            left_over.append(name)
        elif name in seen:
            twice.append(name)
        else:
            seen.add(name)
            if tuple(tensor.shape) == tuple(expected[name]):
                yield name, tensor
            else:
                misfits.append(f"{name} {tuple(tensor.shape)} for {tuple(expected[name])}")
    complaints = [
        f"{what}: {', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}"
        for what, names in (
            ("missing", [name for name in expected if name not in seen]),
            ("left over", left_over),
            ("of another shape", misfits),
            ("given twice", twice),
        )
        if names
    ]
    if complaints:
        raise WeightsError(
            f"{where}: the weights do not fit the net; got {'; '.join(complaints)}, expected all "
            f"{len(expected)} tensors of the net and no other. Name the net that the file holds "
            "(--teacher.model, --teacher.architecture.*)."
        )


def read_weights(
    path: str | Path, *, where: str = "weights", stages: int | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Opens a published or own file and yields a net's (name, tensor) in our names.

    The format is told from the names at once; tensors are read one by one. A student's projection
    is left out.

    Args:
        path: A safetensors or torch file.
        where: What the user set, for messages.
        stages: Keep the first stages of a Swin net, with a final norm that only normalises (FD's
            stage-3 target); None: all.

    Raises: WeightsError: if the file cannot be read or is of no known format.
    """
    tensors = read(path, where=where)
    items = translate(detect(tensors, where=where), tensors.items())
    items = ((name, t) for name, t in items if not name.startswith("projection."))
    return items if stages is None else swin.first_stages(items, stages)
