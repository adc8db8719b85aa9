"""Precision against recall, for boxes and masks at IoU 0.5 and 0.75. No torch."""

from __future__ import annotations

from pathlib import Path

from fd_large.tasks.detection.scores.scoring import CURVES, Scores

# Okabe and Ito's palette, "Color Universal Design", 2008.
COLOURS = ("#0072B2", "#D55E00")
GREY, LIGHT_GREY = "#5f5f5f", "#d9d9d9"
AP_NAMES = {0.5: "AP50", 0.75: "AP75"}


def draw_curves(scores: Scores, path: Path) -> None:
    """Draws a panel for boxes and one for masks as a PNG."""
    from matplotlib.figure import Figure

    kinds = scores.kinds
    figure = Figure(figsize=(4.1 * len(kinds) + 0.3, 4.0), dpi=150, layout="constrained")
    figure.get_layout_engine().set(wspace=0.05)
    panels = figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0]
    for axes, (kind, of_kind) in zip(panels, kinds.items(), strict=True):
        for colour, iou in zip(COLOURS, CURVES, strict=True):
            curve = of_kind.curves[iou]
            axes.plot(
                [place / 100 for place in range(len(curve))],
                curve,
                color=colour,
                linewidth=2,
                label=f"IoU {iou}: {AP_NAMES[iou]} {of_kind.numbers[AP_NAMES[iou]]:.3f}",
            )
        axes.set_title(f"{kind}, AP {of_kind.numbers['AP']:.3f}", fontsize=12)
        axes.set_xlabel("recall", fontsize=10)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GREY)
        axes.tick_params(colors=GREY, labelsize=9)
        axes.grid(color=LIGHT_GREY, linewidth=0.6)
        axes.legend(fontsize=9, frameon=False, loc="best")
    panels[0].set_ylabel("precision, mean over classes", fontsize=10)
    figure.savefig(path)
