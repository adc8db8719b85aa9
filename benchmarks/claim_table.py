"""Evaluates the finished rows of claim.py: rates, differences, intervals, judgement and plot.

The interval of a difference accounts for the choice of teachers, of fine-tuning seeds and of test
images. Each pair gives one difference, averaged over its seeds. The spread of these differences
over the pairs contains the effect of teachers and seeds; its half width is by Student's t with one
degree of freedom less than there are pairs. All pairs share the test images, whose effect the
package's paired bootstrap estimates (fd_large/probes/paired.py). The squares of the two half widths
are added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
import numpy as np

from fd_large.probes.paired import difference, student_t

TITLES = {
    "teacher": "teacher, of pooled vectors",
    "control": "control: teacher, trained on",
    "student": "student of the teacher's map",
    "pooled": "student of its pooled vector",
}
REGISTERED = ("teacher", "control", "student")
"""The kinds of rows of the first registration, in the order in which those of a pair are made."""
COMPARISONS = (
    ("student", "control"),
    ("student", "teacher"),
    ("control", "teacher"),
    ("student", "pooled"),
    ("pooled", "teacher"),
)
"""Pairs of rows that are compared; the first two decide, and the second is the paper's own."""
MARGIN = 1.0
"""Largest difference of accuracies, in points, that counts as none."""
COLOURS = {
    "teacher": "#5f5f5f",
    "control": "#D55E00",
    "student": "#0072B2",
    "pooled": "#009E73",
}

Interval = Sequence[float]
Rows = Mapping[tuple[int, str], Mapping[str, Any]]


def judgement(control: Interval, teacher: Interval) -> str:
    """Returns the judgement of the claim by the rule that was registered before the experiment.

    Args:
        control: 95% interval (low, high) of the student's accuracy less the control's, in points.
        teacher: 95% interval (low, high) of the student's accuracy less the teacher's, in points.

    Returns: "shown", "refuted at this size" or "open".
    """
    low, high = control
    if low > 0 and teacher[0] > 0:
        return "shown"
    if high < 0 or (low > -MARGIN and high < MARGIN):
        return "refuted at this size"
    return "open"


def half_width(gaps: Sequence[float], of_images: float) -> float:
    """Returns the half width of a difference's 95% interval, which is infinite for a single pair.

    Args:
        gaps: The difference of each pair, in points.
        of_images: Half width of the interval for the choice of test images alone, in points.
    """
    if len(gaps) < 2:
        return float("inf")
    of_pairs = student_t(len(gaps) - 1) * np.std(gaps, ddof=1) / len(gaps) ** 0.5
    return float(np.hypot(of_pairs, of_images))


def table_of(rows: Rows, rates: Sequence[float], pairs: int) -> dict[str, Any]:
    """Returns the results of the finished rows, with the judgement once all rows are finished.

    The chosen learning rate of a kind of row is the one with the best accuracy on the held-out
    images, averaged over pairs and seeds.

    Args:
        rows: The finished rows, as `Claim.rows` returns them.
        rates: The learning rates.
        pairs: Number of pairs of the whole experiment.
    """
    kinds: dict[str, Any] = {}
    for kind in TITLES:
        models = [row for (_, name), row in rows.items() if name == kind]
        if not models:
            continue
        # (pairs, rates, seeds), in per cent.
        held_out, test = (
            np.array([_percent(row, held_out=held_out) for row in models])
            for held_out in (True, False)
        )
        best = int(held_out.mean((0, 2)).argmax())
        hours = [sum(row["cpu_hours"].values()) for row in models]
        kinds[kind] = {
            "pairs": len(models),
            "rate": rates[best],
            "held_out": held_out.mean((0, 2)).tolist(),
            "test": test.mean((0, 2)).tolist(),
            "test_of_pairs": test.mean(2).tolist(),
            "accuracy": float(test[:, best].mean()),
            "spread_of_seeds": float(test.std(2, ddof=1).mean()) if test.shape[2] > 1 else None,
            "loss_end": float(np.mean([row["loss_end"] for row in models])),
            "cpu_hours": float(np.mean(hours)),
        }
    differences = [gap for names in COMPARISONS if (gap := _difference(rows, kinds, *names))]
    judged = f"not judged without all {pairs} pairs of the registration"
    if all((pair, kind) in rows for pair in range(pairs) for kind in REGISTERED):
        control, teacher = (gap["interval"] for gap in differences[:2])
        judged = judgement(control, teacher)
    return {
        "rates": list(rates),
        "rows": kinds,
        "differences": differences,
        "judgement": judged,
        "cpu_hours": sum(sum(row["cpu_hours"].values()) for row in rows.values()),
    }


def _difference(
    rows: Rows, kinds: Mapping[str, Any], name: str, other: str
) -> dict[str, Any] | None:
    """Returns the difference between two kinds of rows, or None if no pair has both.

    Args:
        rows: The finished rows.
        kinds: The results of each kind, with its accuracies on the held-out images.
        name: The first kind.
        other: The kind that is subtracted.
    """
    pairs = sorted(pair for pair, kind in rows if kind == name and (pair, other) in rows)
    if not pairs:
        return None
    place = {kind: int(np.argmax(row["held_out"])) for kind, row in kinds.items()}
    right, beside = (
        np.stack([_tested(rows[pair, kind])[place[kind]] for pair in pairs])
        for kind in (name, other)
    )
    gaps = 100 * (right.mean((1, 2)) - beside.mean((1, 2)))
    images = right.shape[-1]
    drawn = difference(right.reshape(-1, images), beside.reshape(-1, images))
    of_images = (drawn.of_images[1] - drawn.of_images[0]) / 2
    half = half_width(gaps.tolist(), of_images)
    mean = float(gaps.mean())
    return {
        "row": name,
        "other": other,
        "accuracies": [100 * float(scored.mean()) for scored in (right, beside)],
        "of_pairs": gaps.tolist(),
        "mean": mean,
        "half_width": half if np.isfinite(half) else None,
        "half_width_of_images": of_images,
        "interval": [mean - half, mean + half] if np.isfinite(half) else None,
    }


def text_of(table: Mapping[str, Any]) -> str:
    """Returns the accuracies, the differences and the judgement in `table` as lines of text.

    Args:
        table: A result of `table_of`.
    """
    rates = "".join(f"{rate:>8g}" for rate in table["rates"])
    lines = [f"{'test accuracy at rate':34}{rates}   chosen  pairs"]
    for kind, row in table["rows"].items():
        values = "".join(f"{value:8.2f}" for value in row["test"])
        lines.append(f"{TITLES[kind]:34}{values}  {row['rate']:7g}  {row['pairs']:5}")
    for gap in table["differences"]:
        ends = gap["interval"]
        interval = f"({ends[0]:+.2f} to {ends[1]:+.2f})" if ends else "(no interval)"
        accuracies = "{:.2f} - {:.2f}".format(*gap["accuracies"])
        lines.append(
            f"{gap['row']} less {gap['other']}, {len(gap['of_pairs'])} pairs: "
            f"{accuracies} = {gap['mean']:+.2f} {interval}"
        )
    lines.append(f"the claim: {table['judgement']}")
    return "\n".join(lines)


def draw(table: Mapping[str, Any], path: Path) -> None:
    """Draws accuracy over learning rate, and the differences of the pairs with their intervals.

    The rows of the second registration have fewer pairs, so that their mean accuracy does not
    compare with that of the others: only their differences are drawn.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.1])
    rates = table["rates"]
    for kind in (kind for kind in REGISTERED if kind in table["rows"]):
        row, colour = table["rows"][kind], COLOURS[kind]
        for values in row["test_of_pairs"]:
            left.plot(rates, values, color=colour, lw=0.7, alpha=0.35)
        left.plot(rates, row["test"], color=colour, lw=2, label=kind)
        left.plot(row["rate"], row["accuracy"], "o", ms=7, color=colour)
    left.set_xscale("log")
    left.set_xticks(rates, [f"{rate:g}" for rate in rates])
    left.set_xticks([], minor=True)
    left.set_xlabel("learning rate for a batch of 512 (dot: chosen)")
    left.set_ylabel("test accuracy, per cent")
    left.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)
    right.axvspan(-MARGIN, MARGIN, color="#eeeeee", zorder=0)
    right.axvline(0, color="#7f7f7f", lw=1)
    gaps = table["differences"]
    for place, gap in enumerate(gaps):
        colour = COLOURS[gap["row"]]
        right.plot(gap["of_pairs"], [place + 0.18] * len(gap["of_pairs"]), "|", ms=9, color=colour)
        right.plot(gap["mean"], place, "o", color=colour)
        if gap["interval"]:
            right.plot(gap["interval"], [place] * 2, color=colour, lw=2)
    registered = sum({gap["row"], gap["other"]} <= set(REGISTERED) for gap in gaps)
    if registered < len(gaps):
        right.axhline(registered - 0.5, color="#7f7f7f", lw=0.7, ls=":")
        fields = {"transform": right.get_yaxis_transform(), "ha": "right", "fontsize": 9}
        right.text(0.99, registered - 0.3, "exploratory", color="#5f5f5f", **fields)
    right.set_yticks(range(len(gaps)), [f"{gap['row']}\nless {gap['other']}" for gap in gaps])
    right.set_ylim(max(len(gaps), 1) - 0.5, -0.5)
    right.set_xlabel("points, 95% interval (strokes: pairs; grey: within one point)")
    if gaps:
        right.set_title(f"the claim: {table['judgement']}", loc="left", fontsize=10)
    harness.save(figure, path)


def _percent(row: Mapping[str, Any], *, held_out: bool) -> np.ndarray:
    """Returns a row's accuracy in per cent for each learning rate and seed, (rates, seeds).

    Args:
        row: The row, as `Claim.rows` returns it.
        held_out: Whether the accuracy on the held-out images is returned, or that on the test
            images.
    """
    chosen: np.ndarray = row["right"][..., row["held_out"] == held_out]
    return 100 * chosen.mean(-1)


def _tested(row: Mapping[str, Any]) -> np.ndarray:
    """Returns whether the models of a row classified each test image correctly.

    The result is (rates, seeds, N) bool, for each learning rate, seed and test image of `row`.
    """
    tested: np.ndarray = row["right"][..., ~row["held_out"]]
    return tested
