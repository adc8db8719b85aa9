"""Copies each micro batch to the device while the previous micro batch is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from fd_large.data.loader import Batch


class Batches(Protocol):
    """Micro batches of a run, in order, for a number of students."""

    students: int

    def __next__(self) -> tuple[Batch, Batch]:
        """Returns the next micro batch as the loader yielded it, and its copy on the device."""

    def completed(self, batch: Batch) -> Batch:
        """Returns a micro batch, with frozen models' outputs added if several students share them.

        `batch`, on the device, was yielded last. A single student runs the frozen models itself.
        """

    def stage(self) -> None:
        """Starts to copy the next micro batch to the device, if a copy is needed."""


class Prefetch:
    """Yields a loader's micro batches, each with its copy on the device.

    On a GPU, `stage` fetches the next micro batch while the device is busy, and copies it from
    pinned memory on a separate stream. On other devices `stage` does nothing.
    """

    students = 1

    def __init__(self, batches: Iterator[Batch], device: torch.device) -> None:
        self._batches, self._device = batches, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._staged: tuple[Batch, Batch] | None = None

    def completed(self, batch: Batch) -> Batch:
        """Returns `batch` unchanged: a single student runs the frozen models itself."""
        return batch

    def stage(self) -> None:
        """Starts to copy the next micro batch to the device; called while the device computes."""
        if self._stream is None or self._staged is not None:
            return
        batch = next(self._batches, None)
        if batch is None:
            return
        with torch.cuda.stream(self._stream):
            self._staged = batch, batch.to(self._device)

    def __iter__(self) -> Prefetch:
        return self

    def __next__(self) -> tuple[Batch, Batch]:
        """Returns the next micro batch as the loader yielded it, and its copy on the device."""
        if self._staged is None:
            batch = next(self._batches)
            return batch, batch.to(self._device)
        (batch, copy), self._staged = self._staged, None
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._stream)
        # Else the allocator gives their memory to the next copy while they are being read.
        for tensor in copy.tensors():
            tensor.record_stream(computing)
        return batch, copy


class StepForSeveral:
    """The micro batches of one step, which several students take one after another.

    For the first student each micro batch is read from `source`, and `complete` adds the frozen
    models' outputs; the other students get the same tensors. All micro batches of the step stay on
    the device until the step ends.
    """

    def __init__(self, source: Batches, complete: Callable[[Batch], Batch], students: int) -> None:
        self._source, self._complete, self.students = source, complete, students
        self._taken: list[tuple[Batch, Batch]] = []
        self._next = self._done = 0

    def rewind(self) -> None:
        """Goes back to the step's first micro batch, for the next student."""
        self._next = 0

    def stage(self) -> None:
        """While the first student runs, starts to copy the next micro batch to the device."""
        if self._next == len(self._taken):
            self._source.stage()

    def __next__(self) -> tuple[Batch, Batch]:
        """Returns the next micro batch as the loader yielded it, and its copy on the device."""
        if self._next == len(self._taken):
            self._taken.append(next(self._source))
        self._next += 1
        return self._taken[self._next - 1]

    def completed(self, batch: Batch) -> Batch:
        """Returns the micro batch that was yielded last, with the frozen models' outputs added.

        `batch` is that micro batch, on the device. The outputs are computed for the first student
        only.
        """
        if self._done < self._next:
            self._taken[self._done] = self._taken[self._done][0], self._complete(batch)
            self._done += 1
        return self._taken[self._next - 1][1]
