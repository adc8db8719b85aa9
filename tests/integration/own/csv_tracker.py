"""A tracker of the user's own: --runtime.trackers tensorboard module:csv_tracker.py:Csv."""

import csv

from fd_large.runtime.hooks import Tracker


class Csv(Tracker):
    """Writes RUN/losses.csv: a line for each step, once and in order, also after a resume."""

    def on_start(self, setting):
        """Keeps the lines of the steps that the resumed checkpoint holds."""
        path = setting.folder / "losses.csv"
        kept = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = kept[: setting.first_update]
        path.write_text("".join(kept))
        self.file = path.open("a", newline="")
        self.writer = csv.writer(self.file)

    def on_rows(self, rows):
        """Writes the steps of an interval; a row is a line of metrics.jsonl."""
        self.writer.writerows([row["update"], row["loss"]] for row in rows)
        self.file.flush()

    def on_end(self, status):
        """Closes the file."""
        self.file.close()
