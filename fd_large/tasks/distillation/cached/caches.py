"""The caches of a run, which hold its teachers' maps of training views and of held-out views.

The job uses this folder through `RunCaches`, and the task through `FromStored` (read.py).

The maps of held-out views are in a separate cache of the same format, in the subfolder held_out.
Therefore they can be written later than the maps of training views, which stay valid if other
evaluation data is chosen.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from fd_large.data.source import ImageSource
from fd_large.data.views import FixedViews, ViewSettings
from fd_large.errors import CacheError
from fd_large.files import kind_of
from fd_large.ranks import meeting
from fd_large.recipes.fields import require
from fd_large.recipes.sections import Data
from fd_large.tasks.distillation.cached.files import HEADER, Header, num_scales
from fd_large.tasks.distillation.cached.read import (
    CachedTeacher,
    CacheReader,
    StoredMaps,
    blank,
    require_same_views,
)
from fd_large.tasks.distillation.cached.recorder import Recorder, ToRecord
from fd_large.tasks.distillation.cached.views import (
    ViewsToStore,
    batch_size,
    check_fixed_views,
    check_stored_summary,
    set_of,
    training_view,
    view_facts,
)
from fd_large.tasks.distillation.cached.write import TEACHER_FACTS, CacheWriter, header_of
from fd_large.tasks.distillation.held_out import Crops
from fd_large.tasks.distillation.section import (
    CACHED,
    SUMMARY,
    NamedTeacher,
    Views,
    cached_folder,
    check_storable,
    source_flag,
)
from fd_large.tasks.distillation.teacher import PlacedTeacher

# Folder, in a cache, of the maps of held-out views.
FOLDER = "held_out"
EARLY = "epochs_from_stored_maps"
"""Key of the result of `RunCaches.early` in manifests and summary.json."""

log = logging.getLogger(__name__)


class RunCaches:
    """The caches on disk that a run reads, or fills with its teachers' maps.

    A teacher whose source in the recipe is cached:FOLDER has its maps read from the cache FOLDER,
    which is opened on first use.

    Args:
        entries: The recipe's entry of each teacher, by name.
        section: The recipe's section `task.distillation`, with the views and the folder for maps.
        settings: Settings of the views.
        micro_batch_size: Number of images of a micro-batch, from the recipe.

    Attributes:
        folders: The folder of each cache that is read, by the teacher's name.
        stores: Whether the run stores maps in the folder `task.distillation.cache`. With several
            teachers, the maps of each teacher go into a subfolder with the teacher's name.
        recorders: Recorders around the teachers whose maps are stored, by name.
    """

    def __init__(
        self,
        entries: Mapping[str, NamedTeacher],
        section: Views,
        settings: ViewSettings,
        micro_batch_size: int | Literal["auto"],
    ) -> None:
        named = {name: cached_folder(entry.source) for name, entry in entries.items()}
        self.folders = {name: Path(folder) for name, folder in named.items() if folder}
        self._entries, self._section, self.stores = entries, section, bool(section.cache)
        self._settings, self._batch_size = settings, batch_size(micro_batch_size)
        self._held_out: Mapping[str, CacheReader] = {}
        self.recorders: Mapping[str, Recorder] = {}
        self._filled: Mapping[str, CacheReader] = {}
        self._early: list[int] = []

    def __contains__(self, name: str) -> bool:
        return name in self.folders

    def __bool__(self) -> bool:
        return bool(self.folders)

    @cached_property
    def readers(self) -> Mapping[str, CacheReader]:
        """Readers of the maps of training views, by the teacher's name.

        Raises: CacheError: if a header is missing or damaged.
        """
        return {
            name: CacheReader(folder, Header.read(folder, where=source_flag(name)))
            for name, folder in self.folders.items()
        }

    def teachers(self) -> dict[str, CachedTeacher]:
        """Returns a `CachedTeacher` for each cache that is read, by the teacher's name."""
        return {n: CachedTeacher(cache, where=source_flag(n)) for n, cache in self.readers.items()}

    def source_of(self, name: str) -> str:
        """Returns the source of the weights of the teacher `name`.

        If the teacher's maps are read from a cache, the result is the source of the weights that
        computed the maps. Otherwise it is the source in the recipe.
        """
        if name in self.readers:
            return self.readers[name].header.teacher["source"]
        return self._entries[name].source

    # --- recurring views ---

    @property
    def fixed(self) -> FixedViews | None:
        """Generator of views that later epochs repeat; None if every epoch draws new views."""
        views = self._section
        return FixedViews(views.views, views.view_seed) if views.views else None

    def with_views(self, section: Views) -> Views:
        """Returns `section` with the number and the seed of the views that the first cache states.

        The section is returned unchanged if it states a number of views itself, or if the run reads
        no cache.

        Args:
            section: The recipe's section `task.distillation`.
        """
        if section.views or not self.folders:
            return section
        facts = next(iter(self.readers.values())).header.facts
        fields = {name: facts[f"task.distillation.{name}"] for name in ("views", "view_seed")}
        return replace(section, **fields)

    def facts(self, samples: ImageSource) -> dict[str, Any]:
        """Returns the settings that decide the training views, as {name: value}, by `view_facts`.

        The run must repeat its views in later epochs (`fixed` must not be None).

        Args:
            samples: The training images.
        """
        assert self.fixed is not None
        return view_facts(self._settings, self.fixed, samples)

    def views_to_store(self, samples: ImageSource) -> ViewsToStore:
        """Returns a loader of the training views whose maps are written to a cache.

        The run must repeat its views in later epochs (`fixed` must not be None).

        Args:
            samples: The training images.
        """
        assert self.fixed is not None
        return ViewsToStore(
            partial(training_view, samples, self._settings, self.fixed),
            self._settings.image_size,
            self._batch_size,
        )

    # --- before anything heavy ---

    def checks(
        self, data: Data, gives_summary: Callable[[str], bool]
    ) -> Iterator[Callable[[], None]]:
        """Yields functions that raise an error for an incomplete cache or a conflicting setting.

        All ranks must call each of these functions.

        Args:
            data: The recipe's section `data`.
            gives_summary: Whether the model of the teacher with a given name returns a summary
                besides its map.
        """
        for name in self.folders:
            yield partial(self.check, name)
        if self.fixed:
            yield partial(check_fixed_views, self.fixed.count, image_mixup=data.image_mixup)
        if self or self.stores:
            mosaics = {name: entry.mosaic for name, entry in self._entries.items()}
            yield partial(check_storable, data.image_sizes, mosaics)
        for name, entry in self._entries.items():
            if SUMMARY in entry.targets and (self.stores or name in self):
                yield partial(check_stored_summary, name, entry, gives_summary)

    def check(self, name: str) -> None:
        """Raises an error if a cache is incomplete, or if the run also stores maps.

        All ranks must call this method.

        Args:
            name: The name of the teacher whose maps the cache holds.

        Raises:
            ConfigError: if the run also stores maps.
            CacheError: if the cache is incomplete.
        """
        where, folder = source_flag(name), self.folders[name]
        require(
            not self.stores,
            "task.distillation.cache: there is no teacher whose maps could be stored",
            f"{self._section.cache} beside {where} {CACHED}{folder}",
            "one of the two",
            "Leave one of them out",
        )
        meeting.once(f"cache {folder}", lambda: self.readers[name].check_whole(where=where))

    def require_views(self, samples: ImageSource) -> None:
        """Raises CacheError if a cache holds the maps of views that differ from the run's views.

        Args:
            samples: The training images of the run.
        """
        for name, reader in self.readers.items():
            require_same_views(reader.header, self.facts(samples), where=source_flag(name))

    def open_held_out(self, crops: Mapping[str, Crops]) -> None:
        """Opens the caches of the maps of held-out views.

        Args:
            crops: The crops of each set of views, by the set's name.

        Raises: CacheError: if the maps are missing, or are of other views or another teacher.
        """
        facts = held_out_facts(crops, self._settings)
        self._held_out = {
            name: _held_out_reader(reader.folder, reader.header, facts)
            for name, reader in self.readers.items()
        }

    # --- in training ---

    def record(self, teachers: Mapping[str, PlacedTeacher]) -> None:
        """Makes a `Recorder` for each teacher if the recipe names a folder for maps.

        Args:
            teachers: The teachers by name.
        """
        if self.stores:
            where = "task.distillation.cache"
            self.recorders = {n: Recorder(teacher, where=where) for n, teacher in teachers.items()}

    def beside(
        self, epoch: int, samples: ImageSource, **options: Any
    ) -> StoredMaps | ToRecord | None:
        """Returns what the loader adds to the images of an epoch; all ranks must call this method.

        If the run neither reads nor stores maps, the result is None. If the run stores maps, the
        epoch is the first with its view, and some of the view's maps are missing, the result is a
        `ToRecord`, by which the epoch's steps store the maps. Otherwise the result is a
        `StoredMaps`, which reads the view's maps; maps that are still missing are written first.

        Args:
            epoch: Number of the epoch, counted from 0.
            samples: The training images.
            options: Further arguments of `write_cache`, which writes the missing maps.
        """
        if self.fixed is None or not (self.folders or self.recorders):
            return None
        view = epoch % self.fixed.count
        if not self.recorders:
            return StoredMaps(self.readers, set_of(view), samples.__getitem__)
        if not self._filled:
            facts, section = self.facts(samples), self._section
            self._filled = {
                name: recorder.begin(
                    Path(section.cache, name),
                    self._entries[name],
                    facts,
                    precision=section.precision,
                )
                for name, recorder in self.recorders.items()
            }
        missing = [n for n, recorder in self.recorders.items() if not recorder.is_whole(view)]
        if epoch < self.fixed.count and missing:
            return ToRecord(tuple(missing), view)
        if epoch < self.fixed.count and epoch + 1 not in self._early:
            self._early.append(epoch + 1)
            self._tell(epoch + 1)
        for recorder in self.recorders.values():
            recorder.complete(view, self.views_to_store(samples), **options)
        return StoredMaps(self._filled, set_of(view), samples.__getitem__)

    def _tell(self, epoch: int) -> None:
        """Logs that an epoch learns from maps that were stored before the epoch began.

        Args:
            epoch: Number of the epoch, counted from 1.
        """
        precision = self._section.precision
        exact = not num_scales(precision)
        log.log(
            logging.INFO if exact else logging.WARNING,
            "task.distillation.cache: epoch %d learns from the maps in %s, which an earlier run "
            "stored; that run computed the teacher in this epoch, %s",
            epoch,
            self._section.cache,
            "and its maps were the same"
            if exact
            else f"and its losses differ from these by the rounding of {precision}",
        )

    def held_out(self, name: str, crops: Crops) -> StoredMaps | None:
        """Returns the reader of the stored maps of held-out views, or None if no cache is read.

        Args:
            name: Name of the set of held-out views.
            crops: The views of this set.
        """
        return StoredMaps(self._held_out, name, crops.name_of) if self._held_out else None

    def blank_maps(self, size: int) -> dict[str, tuple[Tensor, ...]] | None:
        """Returns zeros shaped like the stored maps of a batch, by the teacher's name.

        The result is None if no cache is read.

        Args:
            size: Number of images.
        """
        if not self.folders:
            return None
        return {
            name: tuple(part.expand(size, *part.shape) for part in blank(reader))
            for name, reader in self.readers.items()
        }

    def early(self) -> dict[str, list[int]]:
        """Returns {`EARLY`: numbers of epochs} if the run stores maps, else an empty dictionary.

        `EARLY` is a key in checkpoints and in summary.json. The numbers, counted from 1, are of
        epochs that were the first with their view, but whose maps had all been stored before. In a
        run that began with an empty cache, the teachers would have run in these epochs. The list
        grows during the run.
        """
        return {EARLY: self._early} if self.recorders else {}

    def resume(self, manifest: Mapping[str, Any]) -> None:
        """Adds the epochs that a checkpoint records to the epochs that `early` returns.

        Args:
            manifest: Manifest of the checkpoint; the epochs are under the key `EARLY`.
        """
        self._early[:] = sorted({*self._early, *manifest.get(EARLY, ())})


def held_out_facts(crops: Mapping[str, Crops], settings: ViewSettings) -> dict[str, Any]:
    """Returns the settings that decide the held-out views, as {name: value}.

    A name is a field of the recipe, or words such as "seed of the views".

    Args:
        crops: The crops of each set of views, by the set's name.
        settings: Settings of the views.
    """
    first = next(iter(crops.values()))
    return {
        "data.image_size": settings.image_size,
        "data.min_crop_scale": settings.min_crop_scale,
        "interpolation": settings.interpolation,
        "eval.views": first.views,
        "seed of the views": first.seed,
        **{f"hash of the list of images of {n}": c.source.fingerprint for n, c in crops.items()},
    }


def held_out_writer(
    folder: Path,
    teacher: PlacedTeacher,
    entry: NamedTeacher,
    crops: Mapping[str, Crops],
    settings: ViewSettings,
    *,
    precision: str,
) -> CacheWriter:
    """Returns the writer of a cache for a teacher's maps of held-out views.

    All ranks must call this function.

    Args:
        folder: Folder of the cache of the teacher's maps of training views.
        teacher, entry, precision: See `header_of`.
        crops, settings: See `held_out_facts`.
    """
    facts = held_out_facts(crops, settings)
    sets = {name: len(cut) for name, cut in crops.items()}
    header = header_of(teacher, entry, facts, precision=precision, sets=sets)
    return CacheWriter(folder / FOLDER, header)


def held_out_views(
    crops: Mapping[str, Crops], settings: ViewSettings, batch_size: int
) -> ViewsToStore:
    """Returns the loader of held-out views for writing a cache.

    Args:
        crops: The crops of each set of views, by the set's name.
        settings: Settings of the views.
        batch_size: Number of images of a forward.
    """
    return ViewsToStore(partial(_cut, crops), settings.image_size, batch_size)


def _cut(crops: Mapping[str, Crops], name: str, view: int) -> Tensor:
    """Returns view number `view` of the set `name` of held-out views, (3, S, S) uint8.

    Args:
        crops: The crops of each set of views, by the set's name.
        name: Name of the set.
        view: Index of the view in the set.
    """
    return crops[name](view)


def _held_out_reader(folder: Path, training: Header, facts: Mapping[str, Any]) -> CacheReader:
    """Returns the reader of the maps of held-out views.

    Args:
        folder: Folder of the cache of training views.
        training: Header of the cache of training views.
        facts: The `held_out_facts` of the run.

    Raises: CacheError: if the maps are missing, or are of other views or another teacher.
    """
    held_out_folder = folder / FOLDER
    if not kind_of(held_out_folder / HEADER):
        raise CacheError(
            f"eval.root: {folder} has no maps of held-out images; got no {FOLDER}/{HEADER}, "
            "expected the maps of this eval.root. Repeat the command that wrote the cache with "
            "--eval.root, which adds these maps, or set --eval.root '' to train without them."
        )
    header = Header.read(held_out_folder, where="eval.root")
    of_teacher = {name: training.facts[name] for name in TEACHER_FACTS}
    require_same_views(header, {**of_teacher, **facts}, where="eval.root")
    reader = CacheReader(held_out_folder, header)
    reader.check_whole(where="eval.root")
    return reader
