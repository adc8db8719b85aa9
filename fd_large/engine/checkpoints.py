"""Saves a run's checkpoints when they are due, and restores them to resume or to roll back."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from fd_large.checkpoint import store
from fd_large.checkpoint.lease import Lease
from fd_large.checkpoint.read import Reader, newest_sound, on_main
from fd_large.checkpoint.write import Saver, in_words
from fd_large.data.bad_images import BadCount
from fd_large.engine.zero import state
from fd_large.engine.zero.engine import Engine
from fd_large.engine.zero.optimizer import ADAMW_MOMENTS, kept_by
from fd_large.errors import CheckpointError, FDError, NotFiniteError
from fd_large.files import json_object, kind_of
from fd_large.ranks import distributed
from fd_large.ranks.processes import hold
from fd_large.recipes.left import decided_steps, recorded_length
from fd_large.recipes.sections import Runtime

log = logging.getLogger(__name__)


class Checkpoints:
    """Saves and restores the state of one run.

    Args:
        folder: The run's folder.
        engine: The engine whose state is saved and restored.
        runtime: The recipe's section, with the interval of saves, the number of checkpoints to
            keep, and the number of failed saves that ends the run.
        global_batch_size: Images per step, over all ranks.
        facts: JSON-safe entries of every manifest: the recipe, the commit, the task's facts.
        check_stored: Raises CheckpointError for a manifest that belongs to another training.
        lease: The right of this launch of the run to write the folder; None if no other process can
            write it.

    Attributes:
        optimizer_steps: Number of steps that were not skipped; the trainer adds to it.
        evaluated: Whether the evaluation due at the step of the restored checkpoint was made.
        decided_steps: Number of steps to which a time limit (optim.max_seconds, which only earlier
            versions had) shortened the restored run; later checkpoints record it again. None if
            there was no such limit, or if the recipe's length has changed since.
        bad_images: Numbers of unusable and of tried images in all launches of the run, over all
            ranks. Set from the restored checkpoint; the trainer adds to them.
        stored_recipe: The recipe of the restored checkpoint; empty if none was restored.
    """

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        *,
        runtime: Runtime,
        global_batch_size: int,
        facts: Mapping[str, Any],
        check_stored: Callable[[Mapping[str, Any]], None],
        lease: Lease | None = None,
    ) -> None:
        self._folder, self._engine, self._runtime = folder, engine, runtime
        self._global_batch_size, self._facts = global_batch_size, facts
        self._check_stored = check_stored
        self._saver = Saver(
            folder,
            keep_last=runtime.keep_last,
            keep_every=runtime.keep_every,
            lease=lease,
            copies=engine.disk is None,
        )
        self._lease = lease
        self._failures, self._written = 0, True
        self._saved: int | None = None
        self._manifest: dict[str, Any] = {}
        self._begun = 0.0
        self._best: int | None = None
        self.optimizer_steps = 0
        self.evaluated = True
        self.decided_steps: int | None = None
        self.bad_images = BadCount(0, 0)
        self.stored_recipe: dict[str, Any] = {}

    @property
    def bytes(self) -> int:
        """Size of one checkpoint, over all ranks, in bytes."""
        moments = len(kept_by(self._engine.gate.inner).moments)
        each = 4 * (1 + moments + state.has_average(self._engine))  # The first is the master.
        return each * sum(state.layout_of(self._engine).sizes.values())

    def sweep(self) -> None:
        """Removes half-written checkpoints of a killed run; not to be called while a run trains."""
        on_main(lambda: store.sweep(self._folder))

    def log_disk_use(self, total_steps: int) -> None:
        """Logs the sizes of a checkpoint, of all checkpoints to keep, and of the free disk space.

        `total_steps` is the number of steps of the whole run. The message is a warning if the
        checkpoints do not fit.
        """
        each, runtime = self.bytes, self._runtime
        # One more while the next is being written.
        most = runtime.keep_last + 1
        if runtime.keep_every:
            most += total_steps // runtime.keep_every
        free = shutil.disk_usage(self._folder).free
        unit, name = (1e9, "GB") if most * each >= 1e9 else (1e6, "MB")
        text = (
            f"checkpoints: {each / unit:.1f} {name} each, up to {most} at a time: "
            f"{most * each / unit:.1f} {name}; {free / unit:.1f} {name} free"
        )
        # Those of an earlier start have their room.
        if most * each > free and (most - len(store.complete(self._folder))) * each > free:
            log.warning(
                "%s: THE CHECKPOINTS DO NOT FIT. Make room, or keep fewer with "
                "--runtime.keep_last and --runtime.keep_every",
                text,
            )
        else:
            log.debug("%s", text)

    def due(self, step: int, steps_per_epoch: int) -> bool:
        """Returns whether the recipe asks for a checkpoint after `step` finished steps.

        If `runtime.save_every` is 0, `steps_per_epoch` steps lie between two checkpoints.
        """
        return step % (self._runtime.save_every or steps_per_epoch) == 0

    @property
    def flags(self) -> list[bool]:
        """Three flags of this rank for the loop's all-reduce.

        They say whether the rank is still writing a checkpoint, whether writing has failed, and
        whether it has failed because the rank's state is not finite. The last flag stays set until
        a state is restored or the next save begins.
        """
        return [self._saver.busy, self._saver.failed, bool(self._saver.not_finite)]

    def after_update(
        self, *, busy_anywhere: bool, failed_anywhere: bool, broken_anywhere: bool = False
    ) -> float | None:
        """Completes the checkpoint that is being written, if no rank is still writing.

        The arguments are the `flags` of any rank. If a rank has failed, the checkpoint is not
        committed.

        Returns: the seconds that the save took; None if no checkpoint was committed.
        """
        if self._saver.begun and not busy_anywhere:
            return self._finish(failed_anywhere, broken_anywhere)
        return None

    def save(self, step: int, *, evaluated: bool = True, prunes: bool = True) -> float | None:
        """Starts to write the state after a step; all ranks must call this method.

        State that is offloaded to a disk is written completely before training goes on. If the
        state of any rank is not finite, no checkpoint is made. A step that has been saved is not
        saved again.

        Args:
            step: Number of finished steps.
            evaluated: Whether the evaluation that is due after this step, if any, was made.
            prunes: Whether old checkpoints are deleted when the new checkpoint is complete.

        Returns: the seconds that a save took, or None if this call waited for no save or that save
            failed. With offload to a disk, this call waits for its own save. Otherwise it waits for
            the previous save, if that was still being written.
        """
        if self._saved == step:
            return None
        waited = self._wait()
        self._begun = time.monotonic()
        self._manifest = manifest = {
            **self._facts,
            "update": step,
            "optimizer_steps": self.optimizer_steps,
            "evaluated": evaluated,
            "bad_images": list(self.bad_images),
            "ema": state.has_average(self._engine),
            "moments": list(kept_by(self._engine.gate.inner).moments),
            "samples": step * self._global_batch_size,
            "world_size": distributed.world_size(),
            "zero_stage": self._engine.stage,
            "layout": state.layout_of(self._engine).to_dict(),
            **recorded_length(step, self.decided_steps),
        }
        self._saved = step
        self._saver.begin(
            manifest,
            state.shards(self._engine),
            not_finite=state.not_finite(self._engine),
            prunes=prunes,
        )
        if self._engine.disk is not None:
            waited = self._wait()
        stood_still = time.monotonic() - self._begun
        log.debug("checkpoint of step %d: training waited %.2f s", step, stood_still)
        return waited

    def mark_evaluated(self) -> None:
        """Records in the newest checkpoint that the evaluation due at its step was made."""
        # A checkpoint that is still being written gets its manifest at the end.
        self._manifest["evaluated"] = True
        if distributed.is_main() and not self._saver.begun and self._saved is not None:
            path = store.checkpoints_of(self._folder) / store.name_of(self._saved)
            try:
                store.amend(path, {"evaluated": True}, self._lease)
            except (OSError, FDError) as error:
                log.warning(
                    "%s: could not be marked as evaluated, so that a resume evaluates again: %s",
                    path,
                    error,
                )

    def mark_best(self, step: int) -> None:
        """Points the link `checkpoints/best` at the checkpoint of a step, when it is complete."""
        self._best = step
        if not self._saver.begun:
            self._link_best()

    def _link_best(self) -> None:
        if self._best is None or not distributed.is_main():
            return
        try:
            if store.set_best(self._folder, self._best, self._lease):
                self._best = None
        except (OSError, FDError) as error:
            log.warning("%s/%s was not written: %s", self._folder, store.BEST, error)

    def settle(self) -> bool:
        """Waits on all ranks for a save that has begun, and closes the saver.

        Returns whether the last save succeeded; True if there was no save.
        """
        self._wait()
        self._saver.close()
        return self._written

    def _wait(self) -> float | None:
        if not self._saver.begun:
            return None
        # A rank whose launcher has died may outlive its grace period for as long as this takes.
        with hold():
            self._saver.wait()
            worst = distributed.max_rank(self._saver.failed + bool(self._saver.not_finite))
            return self._finish(worst > 0, worst > 1)

    def resume(self) -> int:
        """Restores the newest sound checkpoint: one that is undamaged and finite.

        Returns: the step of the checkpoint, or 0 if the run has no checkpoints.

        Raises:
            CheckpointError: If the checkpoints' folder is a broken link, none of the checkpoints is
                sound, or the newest sound checkpoint belongs to another model or training.
            NotFiniteError: If no checkpoint is sound, and a checkpoint has numbers that are not
                finite.
        """
        place = store.checkpoints_of(self._folder)
        if place.is_symlink() and not kind_of(place):
            raise CheckpointError(
                f"{place}: a broken link; got a link to {place.readlink()}, expected the folder "
                "of the checkpoints. Mount its disk, or remove the link to start over."
            )
        step, damaged, broken = self._restore_newest()
        if step is None and broken:
            raise NotFiniteError(
                f"{place}: no checkpoint to resume from; got {'; '.join(broken[:3])}, expected "
                "finite numbers. Put an older checkpoint back if you have a copy, or start over "
                "with --fresh and a lower --optim.base_lr."
            )
        if step is None and damaged:
            raise CheckpointError(
                f"{place}: no sound checkpoint; got {damaged[0]}, expected the files as they were "
                "written. Restore the files, or start over with --fresh."
            )
        return step or 0

    def roll_back(self, at_most: int) -> int | None:
        """Restores the newest sound checkpoint whose step is at most `at_most`.

        Returns its step, or None if there is no such checkpoint.
        """
        self.settle()
        return self._restore_newest(at_most)[0]

    def _restore_newest(
        self, at_most: int | None = None
    ) -> tuple[int | None, list[str], list[str]]:
        """Restores the newest sound checkpoint, of at most `at_most` steps unless this is None.

        All ranks must call this method. When a checkpoint has been restored, the newer checkpoints
        that are damaged or not finite have been renamed (`store.set_aside`).

        Returns: the step of the restored checkpoint, or None if there is none; messages about
            damaged newer checkpoints; messages about newer checkpoints that are not finite.
        """
        damaged: list[str] = []
        broken: dict[str, str] = {}
        while True:
            reader, complaints = newest_sound(self._folder, at_most=at_most)
            for complaint in complaints:
                log.error("DAMAGED CHECKPOINT, skipped: %s", complaint)
            damaged += complaints
            if reader is None:
                return None, damaged, list(broken.values())
            step: int = reader.manifest["update"]
            try:
                self._restore(reader)
            except NotFiniteError as error:
                log.error("BROKEN CHECKPOINT, skipped: %s", error)
                broken[reader.path.name] = str(error)
                at_most = step - 1
                continue
            # Otherwise they would count among the newest checkpoints, which are kept.
            on_main(partial(store.set_aside, self._folder, list(broken)))
            return step, damaged, list(broken.values())

    def _restore(self, reader: Reader) -> None:
        """Writes a stored state into the engine; all ranks must call this method.

        Raises:
            CheckpointError: If the checkpoint belongs to another model or training.
            NotFiniteError: On all ranks, if a rank read a value that is not finite.
        """
        self._check_fits(reader)
        manifest = reader.manifest
        self.optimizer_steps = manifest.get("optimizer_steps", manifest["update"])
        self.evaluated = manifest.get("evaluated", True)
        self.decided_steps = self._decided_steps(manifest)
        self.stored_recipe = manifest.get("recipe", {})
        self.bad_images = BadCount(*manifest.get("bad_images", (0, 0)))

        def restore() -> None:
            state.restore(
                self._engine,
                reader.read,
                finished=manifest["update"],
                steps=self.optimizer_steps,
                ema=manifest.get("ema", False),
            )
            if broken := state.not_finite(self._engine):
                raise NotFiniteError(f"{reader.path}: {in_words(broken)} is not finite")

        distributed.together(restore)
        self._saver.not_finite = ()
        state.complete(self._engine)
        self._saved = manifest["update"]

    def _decided_steps(self, manifest: Mapping[str, Any]) -> int | None:
        before, now = (of.get("recipe", {}).get("optim", {}) for of in (manifest, self._facts))
        if any(before.get(name) != now.get(name) for name in ("epochs", "max_steps")):
            return None
        return decided_steps(manifest, json_object(self._folder / "time_box.json"))

    def _check_fits(self, reader: Reader) -> None:
        sizes, stored = state.layout_of(self._engine).sizes, reader.layout.sizes
        if sizes != stored:
            names = sorted(n for n in sizes.keys() | stored.keys() if sizes.get(n) != stored.get(n))
            raise CheckpointError(
                f"{reader.path}: belongs to another model; got {len(names)} tensors that differ "
                f"({', '.join(names[:3])}, ...), expected the tensors of this recipe. Set another "
                "--runtime.run_dir, or start over with --fresh."
            )
        moments = set(kept_by(self._engine.gate.inner).moments)
        stored_moments = set(reader.manifest.get("moments", ADAMW_MOMENTS))
        if moments != stored_moments:
            raise CheckpointError(
                f"{reader.path}: belongs to another optimiser; got "
                f"{', '.join(sorted(stored_moments)) or 'nothing'} of each parameter, expected "
                f"{', '.join(sorted(moments)) or 'nothing'}. Restore the file of optim.name, or "
                "start over with --fresh."
            )
        self._check_stored(reader.manifest)
        if reader.manifest.get("pictures") != self._facts["pictures"]:
            log.warning(
                "data.root: NOT THE IMAGES that this run began with (names were added, removed or "
                "changed): the run continues with another order of images"
            )

    def _finish(self, failed_anywhere: bool, broken_anywhere: bool) -> float | None:
        self._written = self._saver.finish(
            failed_anywhere=failed_anywhere, broken_anywhere=broken_anywhere
        )
        if self._written:
            self._failures = 0
            self._link_best()
            # Until the last byte was written, not until now: an evaluation may lie in between.
            return self._saver.ended - self._begun
        self._saved = None
        if broken_anywhere:
            return None
        self._failures += 1
        limit = self._runtime.max_failed_saves
        if limit and self._failures >= limit:
            error = CheckpointError(
                f"runtime.max_failed_saves: checkpoints cannot be written; got {self._failures} "
                f"failed saves in a row, expected fewer than {limit}. Make room in {self._folder} "
                "and start the same command again."
            )
            error.agreed = True
            raise error
        return None
