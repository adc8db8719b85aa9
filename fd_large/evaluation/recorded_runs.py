"""Runs that one command trains one after another, with a record of each run in its folder.

The record has the run's inputs and result, and is first written before the run trains. So the same
command, started again, continues where it stopped, and a folder with a different run is refused.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fd_large import files
from fd_large.errors import ConfigError, Exit
from fd_large.files import out_folder, read_json, write_json
from fd_large.recipes.file_names import SUMMARY
from fd_large.recipes.run import Run, difference
from fd_large.tasks.registry import kind_of

# Fields that two starts may set differently, since they change no score.
_FREE = frozenset({"data.cache", "data.cache_gb", "data.workers"})


def decides(field: str, task: str) -> bool:
    """Whether a field of a recipe may affect a score.

    Args:
        field: Name of the field, section.field.
        task: The recipe's `task.name`.
    """
    if field == "batch.micro_batch_size":
        return kind_of(task).depends_on_passes
    return field not in _FREE and (field == "runtime.seed" or not field.startswith("runtime."))


def unlike(first: Run, run: Run) -> dict[str, tuple[Any, Any]]:
    """Returns the differences between two recipes, {field: (value in `first`, value in `run`)}.

    Fields of the model, its normalisation and its weights are left out, since these differ on
    purpose. In the section `student`, only the drop path rate is included.

    Args:
        first: The recipe with which `run` is compared.
        run: The recipe.
    """
    differences = {
        "recipe" if field == "name" else field: values
        for field, values in difference(first, run).items()
        if decides(field, run.task.name) and not _is_of_the_model(field)
    }
    return dict(sorted(differences.items(), key=lambda item: item[0] != "recipe"))


def _is_of_the_model(field: str) -> bool:
    section, _, name = field.partition(".")
    if section == "student":
        return name != "drop_path_rate"
    return field == "data.root" or section == "runtime" or name.endswith(".statistics")


def train(
    run: Run, deepspeed_config: str, train_run: Callable[..., int]
) -> tuple[int, dict[str, Any]]:
    """Trains a run.

    Args:
        run: The recipe.
        deepspeed_config: DeepSpeed's JSON, a name or a path.
        train_run: Function that trains a run, (run, deepspeed_config=...) -> exit code.

    Returns: the exit code, and the content of summary.json, which is empty if the run is not
        finished. The code of a finished run is 75 if a signal to stop came at its end, so that
        no further run starts.
    """
    from fd_large.engine.zero import start
    from fd_large.ranks import distributed
    from fd_large.runtime import preemption

    preemption.asked_too_late()  # Forgets what an earlier run was asked.
    try:
        code = train_run(run, deepspeed_config=deepspeed_config)
    finally:
        # Further runs follow in this process.
        start.forget_engines()
        gc.collect()
    if code:
        return code, {}
    # Rank 0 wrote it; the others may be here before it is written.
    summary = distributed.of_main(lambda: read_json(Path(run.run_dir()) / SUMMARY, holds=dict))
    return Exit.AGAIN if distributed.any_rank(preemption.asked_too_late()) else Exit.DONE, summary


class RecordedRun(NamedTuple):
    """Run with a record in its folder.

    Attributes:
        file: Name of the record's file in the run's folder.
        what: Description of the run for messages, such as "a trial".
        run: The recipe.
        inputs: Inputs outside of the recipe that affect the result, such as {"weights": digest}.
        known: Further entries of the record.
    """

    file: str
    what: str
    run: Run
    inputs: Mapping[str, str]
    known: Mapping[str, Any] = {}

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.run.run_dir())

    def read(self) -> dict[str, Any]:
        """Returns the record that an earlier start of the command wrote, or {} if there is none.

        A record of a different run is ignored if it is the folder's only file, since no training
        began then.

        Raises: ConfigError: if the folder holds a run of another recipe, or with other inputs.
        """
        path = self.folder / self.file
        if not files.kind_of(path, where="--out"):
            return {}
        record = read_json(path, where="--out", holds=dict)
        differences = difference(Run.from_dict(record.get("recipe", {})), self.run)
        differences |= {name: (record.get(name), now) for name, now in self.inputs.items()}
        changed = "; ".join(
            f"{name} {was!r} -> {now!r}"
            for name, (was, now) in differences.items()
            if was != now and decides(name, self.run.task.name)
        )
        if changed and [file.name for file in self.folder.iterdir()] == [self.file]:
            return {}
        if changed:
            raise ConfigError(
                f"{path.parent}: holds {self.what} of another recipe, other images or other "
                f"weights; got {changed}, expected the same. Set --out to another folder."
            )
        return record

    def write(self, **outcome: Any) -> None:
        """Writes the record to the run's folder, which is created if it is missing.

        Args:
            outcome: Entries of the result, such as its status; none before the training.
        """
        known = {"recipe": self.run.to_dict(), **self.inputs, **self.known}
        write_json(out_folder(self.folder) / self.file, {**known, **outcome})
