"""Checks every oracle file in a folder: `python tests/oracles/oracles.py FOLDER`.

The kind of a file is read from its JSON, never from its name, so that any folder of such files can
be checked. Prints a table of errors beside tolerances and exits 1 past any of them. Nothing is
passed over silently: a file is `ok`, `FAIL`, `not yet: REASON` or `left out: REASON`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path[:0] = map(str, (Path(__file__).resolve().parents[1] / "support").iterdir())

from oracles_dense import CHECKS as DENSE_CHECKS
from oracles_depth import CHECKS as DEPTH_CHECKS
from oracles_detection import CHECKS as DETECTION_CHECKS
from oracles_detection_views import CHECKS as DETECTION_VIEW_CHECKS
from oracles_engine import CHECKS as ENGINE_CHECKS
from oracles_masked import CHECKS as MASKED_CHECKS
from oracles_masked import NOT_YET as MASKED_NOT_YET
from oracles_masked import NOT_YET_PARTS as MASKED_NOT_YET_PARTS
from oracles_models import CHECKS as MODEL_CHECKS
from oracles_models import Row, Skipped, Tensors
from oracles_multi import CHECKS as MULTI_CHECKS
from oracles_multi import NOT_YET_PARTS as MULTI_NOT_YET_PARTS
from oracles_multi_batches import CHECKS as MULTI_BATCH_CHECKS
from oracles_multi_heads import CHECKS as MULTI_HEAD_CHECKS
from safetensors.torch import load_file

CHECKS = {
    **MODEL_CHECKS,
    **ENGINE_CHECKS,
    **DENSE_CHECKS,
    **DEPTH_CHECKS,
    **DETECTION_CHECKS,
    **DETECTION_VIEW_CHECKS,
    **MULTI_CHECKS,
    **MULTI_HEAD_CHECKS,
    **MULTI_BATCH_CHECKS,
    **MASKED_CHECKS,
}

# Parts of files whose other parts are checked.
NOT_YET_PARTS = {
    "simmim": "decoder and losses: masked image modelling is no task of the engine yet",
    **MULTI_NOT_YET_PARTS,
    **MASKED_NOT_YET_PARTS,
}
# Kinds that no part of the package stands behind yet, and why.
NOT_YET: dict[str, str] = {**MASKED_NOT_YET}

_CLASSES = (
    ("SwinV2ForFD", "fd_swinv2"),
    ("SimMIM", "simmim"),
    ("SwinTransformerV2", "swinv2_official"),
    ("VisionTransformerForFD", "fd_vit"),
    ("CLIP.visual", "fd_teacher_clip"),
    ("WarpperVisionTransformer", "fd_teacher_vit"),
    ("WarpperSwinTransformer", "fd_teacher_swin"),
)
_KEYS = (
    ({"combos", "meaning"}, "schedule"),
    ({"fd_pretrain", "finetune"}, "fd_optim_groups"),
    ({"cases", "bicubic_float32_vs_float64"}, "interpolation"),
)
_CONFIG_KEYS = (
    ({"student", "teacher", "pred_feat", "base_lr"}, "fd_training_run"),
    ({"student_width", "teacher_width", "beta"}, "fd_loss"),
    ({"size_in", "size_out"}, "fd_teacher_resize"),
)


@dataclass
class Verdict:
    """What is printed of a file."""

    file: str
    kind: str
    worst: Row | None
    text: str

    @property
    def failed(self) -> bool:
        return self.text.startswith("FAIL")


def kind_of(spec: dict) -> str:
    """Returns the kind that a JSON tells of itself; "unknown" if it tells none."""
    if "kind" in spec:
        return spec["kind"]
    config = spec.get("config", {})
    if "class_" in config:
        for start, kind in _CLASSES:
            if config["class_"].startswith(start):
                return kind
    for keys, kind in _KEYS:
        if keys <= spec.keys():
            return kind
    for keys, kind in _CONFIG_KEYS:
        if keys <= config.keys():
            return kind
    return "unknown"


def check_file(path: Path, dtype: torch.dtype = torch.float32) -> Verdict:
    """Checks one JSON with the safetensors file beside it, where there is one."""
    spec = json.loads(path.read_text())
    kind = kind_of(spec)
    if kind in NOT_YET:
        return Verdict(path.stem, kind, None, f"not yet: {NOT_YET[kind]}")
    if kind not in CHECKS:
        return Verdict(path.stem, kind, None, "FAIL: no check for this kind")
    data = path.with_suffix(".safetensors")
    tensors: Tensors = load_file(data) if data.exists() else {}
    if spec.get("tensors") and set(spec["tensors"]) != set(tensors):
        return Verdict(path.stem, kind, None, "FAIL: the tensors are not those of the JSON")
    try:
        result = CHECKS[kind]({**spec, "kind": kind}, tensors, dtype)
    except Exception as error:  # One broken file must not hide the others.
        return Verdict(path.stem, kind, None, f"FAIL: {type(error).__name__}: {error}")
    if isinstance(result, Skipped):
        return Verdict(path.stem, kind, None, f"{result.verdict}: {result.reason}")
    if not result:
        return Verdict(path.stem, kind, None, "FAIL: nothing was compared")
    worst = max(result, key=lambda row: row.error / row.tolerance if row.tolerance else row.error)
    past = [row.label for row in result if not row.error <= row.tolerance]
    text = f"FAIL: {', '.join(past[:4])}" if past else f"ok ({len(result)} compared)"
    if kind in NOT_YET_PARTS:
        text += f"; not yet: {NOT_YET_PARTS[kind]}"
    return Verdict(path.stem, kind, worst, text)


def check_folder(folder: Path, dtype: torch.dtype = torch.float32) -> list[Verdict]:
    """Checks every JSON of a folder, and names tensors that have no JSON."""
    verdicts = [check_file(path, dtype) for path in sorted(folder.glob("*.json"))]
    for data in sorted(folder.glob("*.safetensors")):
        if not data.with_suffix(".json").exists():
            verdicts.append(Verdict(data.stem, "unknown", None, "FAIL: no JSON beside it"))
    return verdicts


def main(arguments: list[str]) -> int:
    """Prints the table; returns 1 if any file is past its tolerance, or there is none."""
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        print("usage: python tests/oracles/oracles.py FOLDER (a folder of oracle files)")
        return 2
    verdicts = check_folder(Path(arguments[0]))
    width = max((len(v.file) for v in verdicts), default=4)
    print(f"{'file':{width}}  {'kind':16}  {'worst error / tolerance':24}  verdict")
    for v in verdicts:
        figures = ""
        if v.worst is not None:
            figures = f"{v.worst.error:.1e} / {v.worst.tolerance:.1e}"
        where = f" worst: {v.worst.label}" if v.worst is not None else ""
        print(f"{v.file:{width}}  {v.kind:16}  {figures:24}  {v.text}{where}")
    failed = [v.file for v in verdicts if v.failed]
    print(f"{len(verdicts)} files, {len(failed)} failed")
    return 1 if failed or not verdicts else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
