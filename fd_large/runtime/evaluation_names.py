"""How an evaluation names its numbers: SET_METRIC, as in `held_out_loss`. No torch.

Sets: `held_out` (images that training never sees), `unseen_crops` (crops of training images
that training never cuts), `test` (labelled images). Metrics: `loss`; `cosine` of the projected
student and the whitened teacher; `best_constant`, the loss of the best map that ignores the image,
once at the end; `top1` and `top5`, per cent of images whose class is the first, or among the
first five, that a model names; `knn`, the same of the vote of nearest neighbours. Of detections,
`box_AP` and its like are COCO's twelve numbers of boxes, `mask_AP` of masks; three of them go into
words.
"""

from __future__ import annotations

METRICS = ("loss", "cosine", "best_constant", "top1", "top5", "knn")
SETS = {
    "held_out": "held-out",
    "unseen_crops": "unseen crops",
    "test": "test",
    "box": "box",
    "mask": "mask",
}


_OF_DETECTIONS, _TOLD = ("box", "mask"), ("AP", "AP50", "AP75")


def split_name(name: str) -> tuple[str, str]:
    """Returns ("held_out", "loss") for `held_out_loss`; ("evaluation", name) for a strange one."""
    for metric in METRICS:
        if name.endswith(f"_{metric}"):
            return name.removesuffix(f"_{metric}"), metric
    kind, _, number = name.partition("_")
    if kind in _OF_DETECTIONS:
        return kind, number
    return "evaluation", name


def in_words(metrics: dict[str, float]) -> str:
    """Returns "held-out loss 0.3100, cosine 0.4200; unseen crops loss 0.2900, ..."."""
    sets: dict[str, list[str]] = {}
    for name, value in metrics.items():
        group, metric = split_name(name)
        if group in _OF_DETECTIONS and metric not in _TOLD:
            continue
        sets.setdefault(group, []).append(f"{metric.replace('_', ' ')} {value:z.4f}")
    return "; ".join(f"{SETS.get(group, group)} {', '.join(told)}" for group, told in sets.items())
