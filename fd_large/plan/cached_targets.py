"""Computes whether storing a teacher's feature maps is faster than running the teacher each epoch.

A stored map is computed once, and afterwards read from the disk. The loader reads ahead while the
student computes, so that reading costs time only if a map is read more slowly than the student
computes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SECONDS_TOLERANCE = 0.02
"""Fraction of the runs' time that storing must save to be worth the disk space."""


@dataclass(frozen=True, kw_only=True)
class CachedTargets:
    """Sizes and times of a teacher's stored feature maps, and of the runs that use them.

    Attributes:
        images: Number of images in the dataset.
        views: Number of stored views of each image.
        uses: Number of times that each stored map is used, over all epochs and runs.
        map_bytes: Size of a stored map in bytes.
        teacher_seconds: Seconds per image that a rank takes for the teacher's forward.
        student_seconds: Seconds per image that a rank takes for everything else in a step.
        read_bytes_per_second: Rate at which a rank reads stored maps.
    """

    images: int
    views: int
    uses: float
    map_bytes: int
    teacher_seconds: float
    student_seconds: float
    read_bytes_per_second: float

    @property
    def total_bytes(self) -> int:
        """Size of all stored maps on disk, in bytes."""
        return self.images * self.views * self.map_bytes

    @property
    def writing_seconds(self) -> float:
        """Seconds that one rank takes to compute all stored maps."""
        return self.images * self.views * self.teacher_seconds

    @property
    def read_seconds(self) -> float:
        """Seconds that a rank takes to read one stored map."""
        return self.map_bytes / self.read_bytes_per_second

    @property
    def waits_seconds(self) -> float:
        """Seconds per image that a rank waits for a stored map.

        This is the time to read a map less the time of the rest of a step, at least 0.
        """
        return max(0.0, self.read_seconds - self.student_seconds)

    @property
    def saved_share(self) -> float:
        """Fraction of the time of all runs that storing maps saves; negative if it adds time."""
        live = self.uses * (self.teacher_seconds + self.student_seconds)
        stored = self.teacher_seconds + self.uses * (self.student_seconds + self.waits_seconds)
        return 1 - stored / live

    @property
    def pays(self) -> bool:
        """Whether storing saves more than the fraction `SECONDS_TOLERANCE` of all runs' time."""
        return self.saved_share > SECONDS_TOLERANCE

    @property
    def fewest_uses(self) -> float:
        """Number of uses of each map above which storing saves time.

        The number is infinite if storing never saves time.
        """
        gain = self.teacher_seconds - self.waits_seconds
        return self.teacher_seconds / gain if gain > 0 else math.inf

    @property
    def least_rate(self) -> float:
        """Rate in bytes/s at which a rank must read maps so that it never waits for a map."""
        return self.map_bytes / self.student_seconds
