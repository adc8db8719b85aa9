"""Shows the progress of a run, by a bar on a terminal and by log lines elsewhere.

The bar moves with every step, and shows the numbers of the Meter's rows. The training thread draws
the bar: a separate thread for drawing would compete with the ranks of a CPU run, and the lock of
this thread would be copied into forked loading processes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable
from itertools import groupby

from fd_large.ranks import activity
from fd_large.ranks.activity import clock
from fd_large.runtime import terminal
from fd_large.runtime.hooks import Row, Setting, Tracker, Update
from fd_large.runtime.logs import FILE_ONLY

log = logging.getLogger(__name__)

SECONDS_BETWEEN_DRAWINGS = 0.25


class Progress(Tracker):
    """Tracker that shows a progress bar, or logs a line for each interval of steps.

    Args:
        student: Name of the student, with which each line begins, if several students train; "" for
            a single student.
    """

    def __init__(self, student: str = "") -> None:
        self._several, self._whose = bool(student), f"{student}: " if student else ""

    def on_start(self, setting: Setting) -> None:
        """Draws the bar if the output is a terminal and only one student trains.

        Args:
            setting: The facts of the run.
        """
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        self._images, self._metrics = setting.global_batch_size, setting.metrics
        self._seconds_per_update: float | None = None
        self._drawn = 0.0
        self._numbers = ""
        total, first = setting.total_updates, setting.first_update
        self._work = activity.Work(f"{self._whose}training", total, "steps", done=first)
        console = terminal.console()
        self._bar: Bar | None = None
        if console.is_terminal and not console.is_dumb_terminal and not self._several:
            terminal.claim(True)
            self._bar = Bar(
                TextColumn("{task.description}", style="bold"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TextColumn("{task.fields[left]}", style="cyan"),
                console=console,
                expand=True,
                auto_refresh=False,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            # At 80 columns the numbers need the name's room.
            name = setting.facts["recipe"] if console.width >= 100 else ""
            self._bar.add_task(name, total=total, completed=first, numbers="", left="")
            self._bar.start()
            terminal.before_errors.append(self._bar.stop)
            activity.on_change.append(self._draw)

    def on_step(self, update: Update) -> None:
        """Moves the bar to the step `update`, which was just finished."""
        self._work.reach(update.index + 1)

    def on_rows(self, rows: list[Row]) -> None:
        """Shows the last of `rows` in the bar, and logs a line with it.

        If there is a bar, the line goes only to the log file.
        """
        last = rows[-1]
        per_second = last["images_per_second"]
        self._seconds_per_update = self._images / per_second
        self._numbers = (
            f"loss {last['loss']:.4f}  lr {last['learning_rate']:.2g}"
            f"  {per_second:.{0 if per_second >= 100 else 1}f} images/s"
        )
        self._draw()
        log.info(
            "%sstep %d/%d  epoch %d  loss %.5f  grad norm %.3f  lr %.3g  %.1f images/s%s  %s",
            self._whose,
            last["update"] + 1,
            self._work.total,
            last["epoch"],
            last["loss"],
            last["grad_norm"],
            last["learning_rate"],
            per_second,
            _beside_speed(last),
            self._time_left(last["update"] + 1),
            extra=FILE_ONLY if self._bar is not None else None,
        )

    def on_evaluation(self, index: int, metrics: dict[str, float]) -> None:
        """Logs the metrics of an evaluation.

        Metrics of a part of the task, such as one of several teachers, have a line of their own.

        Args:
            index: Number of finished steps.
            metrics: {name: value} of the evaluation.
        """
        words = {key.replace("/", "_"): words for key, words in self._metrics.items()}
        shown = [name for name in words if name in metrics] or metrics
        wholes = {words.get(name, name) for name in shown}
        lines: dict[str, list[tuple[str, float]]] = {"": []}
        for name in shown:
            whole, part = _parted(words.get(name, name), wholes)
            lines.setdefault(part, []).append((whole, metrics[name]))
        log.info("%safter %d steps: %s", self._whose, index, _listed(lines.pop("")))
        for part, numbers in lines.items():
            log.info("%s  %s: %s", self._whose, part, _listed(numbers))

    def on_end(self, status: str) -> None:
        """Draws the bar a last time with `status`, the run's status, and frees the terminal."""
        if self._bar is not None:
            activity.on_change.remove(self._draw)
            self._draw(status, at_once=True)
            self._bar.stop()
            self._bar = None
            terminal.claim(False)
        self._work.end()

    def _draw(self, status: str = "", *, at_once: bool = False) -> None:
        """Draws the bar, if it was not drawn in the last `SECONDS_BETWEEN_DRAWINGS`.

        During work between two steps, such as an evaluation, the bar shows this work in place of
        the numbers.

        Args:
            status: Status of the run at its end, in place of the time left; "" before the end.
            at_once: Whether to draw the bar even if it was drawn just before.
        """
        now, done = time.monotonic(), self._work.done
        part = (self._work, *activity.current())[-1]
        at_once = at_once or (part is self._work and done == self._work.total)
        if self._bar is None or not (at_once or now - self._drawn >= SECONDS_BETWEEN_DRAWINGS):
            return
        self._drawn = now
        self._bar.update(
            self._bar.task_ids[0],
            completed=done,
            total=self._work.total,
            numbers=self._numbers if status or part is self._work else str(part),
            left=status or self._time_left(done),
            refresh=True,
        )

    def _time_left(self, done: float) -> str:
        if self._seconds_per_update is None or self._work.total is None:
            return ""
        return f"{clock((self._work.total - done) * self._seconds_per_update)} left"


def _parted(words: str, all_words: Collection[str]) -> tuple[str, str]:
    """Splits the label of a metric into (label of the whole task's metric, part of the task).

    If `words` is "held-out loss (clip)" and `all_words` contains "held-out loss", the result is
    ("held-out loss", "clip"). If `all_words` lacks the label before the parenthesis, or if there is
    no parenthesis, the result is (words, "").

    Args:
        words: The label.
        all_words: The labels of all metrics that are shown.
    """
    whole, _, part = words.removesuffix(")").rpartition(" (")
    return (whole, part) if whole in all_words else (words, "")


def _listed(numbers: Iterable[tuple[str, float]]) -> str:
    """Formats metrics as in "held-out loss 0.1, cosine 0.5; unseen-crops loss 0.2".

    The first word of a label is not repeated if the label before begins with the same word.

    Args:
        numbers: (label, value) of each metric.
    """
    groups: list[str] = []
    for first, of_group in groupby(numbers, key=lambda item: item[0].split()[0]):
        text = ", ".join(f"{words} {value:z.4f}" for words, value in of_group)
        groups.append(text.replace(f", {first} ", ", "))
    return ("; " if any(", " in group for group in groups) else ", ").join(groups)


def _beside_speed(row: Row) -> str:
    """Formats utilisation, wait for data and memory of `row`, each after two spaces.

    Numbers that `row` does not have are left out; the result is "" if it has none of them.

    Args:
        row: A row of metrics.jsonl.
    """
    parts = []
    if row.get("tflops_per_gpu", 0) >= 0.1:  # On a CPU the number is too small to be of use.
        parts.append(f"{row['tflops_per_gpu']:.3g} TFLOP/s per rank")
    if "mfu" in row:
        again = f" ({100 * row['hardware_utilisation']:.1f}% with recomputation)"
        parts.append(f"MFU {100 * row['mfu']:.1f}%{again}")
    if "data_wait" in row:
        parts.append(f"data wait {100 * row['data_wait']:.1f}%")
    if "memory_bytes" in row:
        parts.append(f"{row['memory_bytes'] / 1e9:.2f} GB")
    return "".join(f"  {part}" for part in parts)
