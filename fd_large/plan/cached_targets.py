"""Computes whether it pays to store a teacher's maps instead of running it in every epoch.

A stored map is computed once, and then read instead. The loader reads ahead while the student
computes, so reading costs time only if it takes longer than the student's part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SECONDS_TOLERANCE = 0.02
"""Share of the time below which storing saves too little to be worth its disk."""


@dataclass(frozen=True, kw_only=True)
class CachedTargets:
    """A teacher's stored maps and the runs that use them.

    Attributes:
        images: Images of the dataset.
        views: Stored views of each image.
        uses: Number of times that each stored map is used, over all epochs and runs.
        map_bytes: Bytes of a stored map.
        teacher_seconds: Seconds of the teacher for an image, on a rank.
        student_seconds: Seconds per image of everything else in a step, on a rank.
        read_bytes_per_second: Rate at which a rank reads the cache.
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
        """Bytes on disk."""
        return self.images * self.views * self.map_bytes

    @property
    def writing_seconds(self) -> float:
        """Seconds of the teacher for all maps, on a rank."""
        return self.images * self.views * self.teacher_seconds

    @property
    def read_seconds(self) -> float:
        """Seconds of a rank for reading a map."""
        return self.map_bytes / self.read_bytes_per_second

    @property
    def waits_seconds(self) -> float:
        """Seconds by which reading a map exceeds everything else in a step."""
        return max(0.0, self.read_seconds - self.student_seconds)

    @property
    def saved_share(self) -> float:
        """Share of the runs' time saved by storing; negative if it costs time."""
        live = self.uses * (self.teacher_seconds + self.student_seconds)
        stored = self.teacher_seconds + self.uses * (self.student_seconds + self.waits_seconds)
        return 1 - stored / live

    @property
    def pays(self) -> bool:
        """Whether storing saves time."""
        return self.saved_share > SECONDS_TOLERANCE

    @property
    def fewest_uses(self) -> float:
        """Uses of each map above which storing saves time; infinite if it never does."""
        gain = self.teacher_seconds - self.waits_seconds
        return self.teacher_seconds / gain if gain > 0 else math.inf

    @property
    def least_rate(self) -> float:
        """Bytes/s that a rank must read to never wait."""
        return self.map_bytes / self.student_seconds
