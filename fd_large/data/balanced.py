"""Several datasets as one source, in which each dataset keeps its share throughout an epoch.

The position in the epoch alone decides from which dataset an image comes. With datasets A and B of
shares 2 and 1, positions repeat the pattern A B A. With more datasets, the number of a dataset's
images up to a position may differ from its share of them by a few images. Each dataset is read in
its own random order. A pass over a dataset may extend over several epochs; after all images of the
dataset were read, a new pass begins, in another random order. Everything is a function of (seed,
epoch, position), so that a resumed run continues exactly, on any number of ranks.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fd_large.data.roots import WeightedRoot, weighted_roots
from fd_large.data.sampler import epoch_order

log = logging.getLogger(__name__)

# Number of epochs that the random numbers tell apart.
_EPOCHS = 2**32
_Place = tuple[int, int]  # A dataset, and one of its blocks.


def open_balanced(root: str, where: str, open_part: Callable[[str, str], Any]) -> Balanced | None:
    """Opens a weighted sum of datasets as one source; returns None if `root` is no weighted sum.

    Args:
        root: Value of `data.root`, such as "0.7 /data/a + 0.3 /data/b" for a weighted sum.
        where: Name of the configuration field with this value, for messages.
        open_part: Function that opens a dataset, given the dataset's root and a name for messages.

    Raises: DataError: if the sum is malformed, or a dataset cannot be used.
    """
    parts = weighted_roots(root, where=where)
    if not parts:
        return None
    opened = Balanced([(part, open_part(part.root, f"{where} ({part.name})")) for part in parts])
    log.info("%s: %s images in %s", where, f"{len(opened):,}", opened.kind)
    return opened


class Balanced:
    """`ImageSource` of all images of several sources, numbered one source after the other.

    An epoch has as many positions as the sources have images. If the share of a source is larger
    than the source's fraction of all images, some of these images therefore occur more than once in
    an epoch; if the share is smaller, some do not occur.

    Attributes:
        kind: Number, names and percentages of the sources, for the log.
        blocks: The order of an epoch, with the interface of `sampler.Blocks`.
        fingerprint: A hash of the sources' shares and fingerprints.
    """

    def __init__(self, parts: Sequence[tuple[WeightedRoot, Any]]) -> None:
        self._sources = [source for _, source in parts]
        shares = [part.share for part, _ in parts]
        self.blocks = _Order(self._sources, shares)
        digest = hashlib.sha256()
        for (_, source), share in zip(parts, shares, strict=True):
            digest.update(f"{share} {source.fingerprint}\n".encode())
        self.fingerprint = digest.hexdigest()
        percents = (f"{part.name} {100 * part.share / sum(shares):.3g}%" for part, _ in parts)
        self.kind = f"{len(parts)} datasets ({', '.join(percents)})"

    def __len__(self) -> int:
        return int(self.blocks.ends[-1])

    def __getitem__(self, index: int) -> str:
        source, number = self._find(index)
        return source[number]

    def read(self, index: int) -> bytes | bytearray:
        """Returns the bytes of image `index`; raises DataError if the image cannot be read."""
        source, number = self._find(index)
        return source.read(number)

    def datasets_of(self, images: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the index in the sum of each image's dataset, (B,) int64 for images (B,)."""
        return np.searchsorted(self.blocks.ends, images, side="right")

    def expect(self, places: Iterable[_Place]) -> None:
        """Starts to fetch the blocks that are needed next, in sources that are read in blocks.

        Each place is (index of a source, number of one of its blocks).
        """
        blocks_of_part: dict[int, list[int]] = {}
        for part, block in places:
            blocks_of_part.setdefault(part, []).append(block)
        for part, blocks in blocks_of_part.items():
            self._sources[part].expect(blocks)

    def _find(self, index: int) -> tuple[Any, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        part = int(self.datasets_of(np.array(index)))
        return self._sources[part], index - (int(self.blocks.ends[part - 1]) if part else 0)


class _Order:
    """The order of an epoch over several sources, with the interface of `sampler.Blocks`.

    The `seed`, `epoch` and `positions` of the methods are as in `sampler.Blocks.order`.

    Args:
        sources: The sources.
        shares: For each source the number of its positions in a period; the period is the sum of
            the shares.

    Attributes:
        ends: (num_sources,) int64, the number of images up to the end of each source.
    """

    def __init__(self, sources: Sequence[Any], shares: Sequence[int]) -> None:
        self._sources, self._shares = sources, np.array(shares)
        self._sizes = np.array([len(source) for source in sources])
        self.ends = np.cumsum(self._sizes)
        # Each source's positions are spread evenly: the k-th of n is due at (k + 1/2) / n.
        numbers = np.repeat(np.arange(len(shares)), shares)
        due = np.concatenate([(np.arange(share) + 0.5) / share for share in shares])
        self._pattern = numbers[np.argsort(due, kind="stable")]
        is_of = self._pattern[:, None] == np.arange(len(shares))
        # (period + 1, num_sources): each source's positions before a place of the pattern.
        self._before = np.concatenate([np.zeros((1, len(shares)), np.int64), is_of.cumsum(0)])

    def order(self, seed: int, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns which images an epoch has at some positions, (B,) int64."""
        images = np.empty(len(positions), np.int64)
        parts = self._pattern[positions % len(self._pattern)]
        turns = self._turns(epoch, positions)
        for part in np.unique(parts).tolist():
            here = np.flatnonzero(parts == part)
            passes, places = np.divmod(turns[here, part], self._sizes[part])
            passes %= _EPOCHS
            start = self.ends[part] - self._sizes[part]
            for number in np.unique(passes).tolist():
                now = passes == number
                images[here[now]] = start + self._of_part(part, seed, number, places[now])
        return images

    def stand_in(self, seed: int, epoch: int, position: int, draw: float) -> int:
        """Returns the index of an image that replaces the image at a position.

        The replacement is from the dataset of this position, and `draw`, a random number in [0, 1),
        chooses it.
        """
        part = int(self._pattern[position % len(self._pattern)])
        number, place = self._place(part, epoch, position)
        start = int(self.ends[part] - self._sizes[part])
        blocks = getattr(self._sources[part], "blocks", None)
        if blocks is None:
            return start + int(draw * self._sizes[part])
        return start + blocks.stand_in(self._seed(part, seed), number, place, draw)

    def ahead(self, seed: int, epoch: int, position: int) -> list[_Place]:
        """Returns the blocks that are needed at a position and soon after it.

        Each block is (index of a source, number of one of its blocks). A source that is not read in
        blocks has none.
        """
        needed: list[_Place] = []
        for part, source in enumerate(self._sources):
            if (blocks := getattr(source, "blocks", None)) is not None:
                number, place = self._place(part, epoch, position)
                ahead = blocks.ahead(self._seed(part, seed), number, place)
                needed += [(part, block) for block in ahead]
        return needed

    def _place(self, part: int, epoch: int, position: int) -> tuple[int, int]:
        """Returns how far source `part` was read before a position of an epoch.

        Returns: the number of the current pass over the source's images, and the position in this
            pass.
        """
        turn = int(self._turns(epoch, np.array([position]))[0, part])
        number, place = divmod(turn, int(self._sizes[part]))
        return number % _EPOCHS, place

    def _turns(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Counts the images that each source has provided before a position, since epoch 0.

        Returns: (B, num_sources) int64.
        """

        def within(positions: NDArray[np.int64]) -> NDArray[np.int64]:
            periods, places = np.divmod(positions, len(self._pattern))
            return periods[:, None] * self._shares + self._before[places]

        return epoch * within(self.ends[-1:]) + within(positions)

    def _of_part(
        self, part: int, seed: int, number: int, places: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        blocks, seed = getattr(self._sources[part], "blocks", None), self._seed(part, seed)
        if blocks is None:
            return epoch_order(int(self._sizes[part]), seed, number, places)
        return blocks.order(seed, number, places)

    @staticmethod
    def _seed(part: int, seed: int) -> int:
        """Returns the seed of source `part`, derived from the run's seed `seed`.

        Without seeds of their own, sources of equal size would get the same order.
        """
        return (seed + part) % 2**64
