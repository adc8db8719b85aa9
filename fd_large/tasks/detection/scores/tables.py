"""Tables of COCO's metrics for the terminal; torch is not imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fd_large.tasks.detection.scores.scoring import NUMBERS, Scores

if TYPE_CHECKING:
    from rich.table import Table

# Width of a terminal, in characters, from which a line holds two classes.
WIDE = 110
MEANINGS = {
    "AP": "mean over IoU 0.50 to 0.95",
    "AP50": "at IoU 0.50",
    "AP75": "at IoU 0.75",
    "APs": "objects below 32 x 32 pixels",
    "APm": "objects from 32 x 32 to 96 x 96",
    "APl": "objects above 96 x 96",
    "AR1": "recall with 1 detection an image",
    "AR10": "recall with 10 detections an image",
    "AR100": "recall with 100 detections an image",
    "ARs": "recall of objects below 32 x 32",
    "ARm": "recall of objects from 32 x 32 to 96 x 96",
    "ARl": "recall of objects above 96 x 96",
}


def numbers_table(scores: Scores, *, tested: str = "") -> Table:
    """Returns a table of COCO's twelve metrics for boxes and for masks, in per cent.

    Args:
        scores: The scores.
        tested: Description of the test settings, or "" if unknown.
    """
    from rich.table import Table

    counts = f"{scores.num_images:,} images, {scores.num_results:,} detections"
    table = Table(title=f"{counts}; {tested}" if tested else counts, title_justify="left")
    table.add_column("")
    for kind in scores.kinds:
        table.add_column(kind, justify="right")
    table.add_column("")
    for number, name in enumerate(NUMBERS):
        table.add_row(
            name,
            *(_shown(kind.numbers[name]) for kind in scores.kinds.values()),
            MEANINGS[name],
            end_section=number in (2, 5, 8),
        )
    return table


def classes_table(scores: Scores) -> Table:
    """Returns a table of AP and AP50, in per cent, of the classes that have objects in the images.

    On a terminal that is at least `WIDE` characters wide, a line holds two classes.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(title="AP and AP50 of the classes that the images show", title_justify="left")
    lines = []
    for place, of_class in enumerate(next(iter(scores.kinds.values())).classes):
        if of_class.ap is None:
            continue
        cells = [of_class.name]
        for kind in scores.kinds.values():
            cells += [_shown(kind.classes[place].ap), _shown(kind.classes[place].ap50)]
        lines.append(cells)
    side_by_side = 2 if Console().width >= WIDE else 1
    rows = -(-len(lines) // side_by_side)
    for _ in range(side_by_side):
        table.add_column("class")
        for kind in scores.kinds:
            table.add_column(kind, justify="right")
            table.add_column(f"{kind} 50", justify="right")
    for number in range(rows):
        # The last line of the right half may be empty.
        table.add_row(*(cell for line in lines[number::rows] for cell in line))
    return table


def _shown(number: float | None) -> str:
    return "-" if number is None or number < 0 else f"{100 * number:.1f}"
