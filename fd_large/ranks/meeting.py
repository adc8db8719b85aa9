"""Runs checks that may take hours on all ranks together, with the slow work done by one rank.

Each rank runs the check in a thread while all ranks meet repeatedly, since a single wait of hours
would time out. Each time that the ranks meet counts as a sign of life, so that the watchdog does
not end the run. Inside a meeting `once` makes a value on one rank and sends it to the others, so
that one rank instead of a thousand lists a dataset or downloads a model.
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch

from fd_large.errors import FDError, LostRankError
from fd_large.ranks import distributed

T = TypeVar("T")

_MOST_SECONDS = 1.0
# Seconds in which other ranks may report the same mistake as the first rank that reports one.
_GRACE_SECONDS = 10.0


def meet(check: Callable[[], T]) -> T:
    """Runs a check on every rank; if any rank's check fails, all ranks raise the error.

    The error is that of the first rank whose check failed, with a message that names the failed
    ranks' nodes (`distributed.together`). All ranks must call this function.

    Args:
        check: Function that raises an FDError or returns a value, and calls no collective. The
            function may call `once`.

    Returns: this rank's value.
    """
    if distributed.world_size() == 1:
        # Signs of life, which several ranks give by meeting.
        with distributed.moving():
            return check()
    meeting = _Meeting()
    token = _present.set(meeting)
    try:
        context = contextvars.copy_context()
        threading.Thread(
            target=context.run, args=(meeting.run, check), name="meeting", daemon=True
        ).start()
        meeting.preside()
    finally:
        _present.reset(token)
    return distributed.together(meeting.outcome)


def once(name: str, make: Callable[[], T], *, of_node: bool = False) -> T:
    """Returns a value that one rank makes for others; outside a meeting each rank makes the value.

    All ranks must make the same calls. If the check of the rank that should make the value has
    ended without this call, each rank that waits for the value makes it itself.

    Args:
        name: Name of the value, the same on all ranks.
        make: Returns the value. The value is pickled, and must be small if `of_node` is True.
        of_node: True if the first rank of each node makes the value for its node; False if rank 0
            makes the value for all ranks.

    Raises: FDError: if `make` raises it, on the rank that calls `make` and on ranks that wait.
    """
    meeting = _present.get()
    return make() if meeting is None else meeting.once((name, of_node), make)


def offer(name: str, value: Any) -> None:
    """Keeps a large value on rank 0 until the end of the meeting, for `fetch`.

    On other ranks and outside a meeting this function does nothing.

    Args:
        name: Name under which other ranks fetch the value.
        value: The value.
    """
    meeting = _present.get()
    if meeting is not None and meeting.leads[False]:
        meeting.offered[name] = value


def fetch(name: str) -> Any:
    """Returns the value that rank 0 has offered under `name` in this meeting (`offer`).

    The result is None if rank 0 has offered nothing under this name. This function may only be
    called within a meeting (`meet`).
    """
    meeting = _present.get()
    assert meeting is not None
    return meeting.fetch(name)


_present: contextvars.ContextVar[_Meeting | None] = contextvars.ContextVar("meeting", default=None)

_Name = tuple[str, bool]
"""Name of a value, and whether the value is made once a node."""


class _Made(NamedTuple):
    """What the maker of a value got: the value, or the error that making the value raised.

    Attributes:
        value: The value; None after an error.
        error: The error, or None.
    """

    value: Any
    error: FDError | None

    def get(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.value


class _State(NamedTuple):
    """A rank's message to all ranks, which the rank sends each time that the ranks meet.

    Attributes:
        node: Name of the rank's node.
        leads: Whether the rank is the first of its node.
        ended: Whether the rank's check has ended.
        error: Text of an exception of the check that is not an FDError, or "".
        failed: Whether the rank's check failed with any exception.
        over: Whether the rank has waited long enough for the other ranks after a failed check. If
            this is True in rank 0's message, all ranks stop waiting.
        num_made: Number of values that the rank made for all ranks and broadcasts next.
        made: Values that the rank made for its node.
        wanted: Name of the value that the rank fetches, or "".
    """

    node: str
    leads: bool
    ended: bool
    error: str
    failed: bool
    over: bool
    num_made: int
    made: dict[_Name, _Made]
    wanted: str


class _Meeting:
    """What a rank needs to take part in a meeting (`meet`).

    Attributes:
        leads: Whether this rank makes values for others: for the key True the values for its node,
            for the key False the values for all ranks. The keys are those of `of_node` in `once`.
        offered: Values that other ranks may fetch from this rank, by name.
    """

    def __init__(self) -> None:
        self.leads = {True: distributed.local_rank() == 0, False: distributed.is_main()}
        self.offered: dict[str, Any] = {}
        self._node = distributed.node_name()
        self._device = distributed.device()
        self._changed = threading.Condition()
        self._woken = threading.Event()
        self._made: dict[_Name, _Made] = {}
        self._unsaid: dict[_Name, _Made] = {}
        self._fetched: dict[str, Any] = {}
        self._wanted = ""
        self._makers_ended = {True: False, False: False}
        self._outcome: _Made | None = None
        self._crash: BaseException | None = None

    # --- in the thread of the check ---

    def run(self, check: Callable[[], Any]) -> None:
        """Runs `check`, and keeps its result or error for the method `outcome`."""
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # Each thread has its own.
            self._outcome = _made_by(check)
        except BaseException as error:  # Raised again where the ranks meet.
            self._crash = error
        self._woken.set()

    def once(self, name: _Name, make: Callable[[], Any]) -> Any:
        """Makes a value, or waits for the rank that makes it; see the function `once`.

        Args:
            name: The value's name, and whether each node has a rank that makes the value.
            make: Function that returns the value.

        Returns: the value.
        """
        _, of_node = name
        if self.leads[of_node]:
            if name not in self._made:
                value = _made_by(make)
                with self._changed:
                    self._made[name] = self._unsaid[name] = value
                self._woken.set()
            return self._made[name].get()
        with self._changed:
            self._changed.wait_for(lambda: name in self._made or self._makers_ended[of_node])
            value = self._made.get(name)
        return make() if value is None else value.get()

    def fetch(self, name: str) -> Any:
        """Asks rank 0 for the value `name` and waits for it; see the function `fetch`.

        Returns: the value, or None if rank 0 has offered no value of this name.
        """
        if name in self.offered:
            return self.offered[name]
        with self._changed:
            self._wanted = name
            self._woken.set()
            self._changed.wait_for(lambda: name in self._fetched)
            return self._fetched.pop(name)

    # --- where the ranks meet ---

    def preside(self) -> None:
        """Meets the other ranks again and again until the checks of all ranks have ended.

        After a failed check, waits at most _GRACE_SECONDS for the checks of the other ranks.

        Raises:
            LostRankError: if the check of another rank raises an exception that is not an FDError.
            Exception: any exception of this rank's check that is not an FDError.
        """
        pause, deadline = 0.02, float("inf")
        while True:
            self._woken.wait(pause)
            self._woken.clear()
            own_state, for_all = self._state(time.monotonic() > deadline)
            states = distributed.gather_objects(own_state)
            something = any(state.num_made or state.made or state.wanted for state in states)
            pause = 0.02 if something else min(_MOST_SECONDS, 2 * pause)
            if states[0].num_made:
                self._hear(distributed.broadcast_object(for_all))
            for state in states:
                if state.node == self._node:
                    self._hear(state.made)
            for name in sorted({state.wanted for state in states} - {""}):
                value = distributed.broadcast_object(self.offered.get(name))
                if name == own_state.wanted:
                    self._take(name, value)
            for of_node in (True, False):
                makers = [s for s in states if s.leads and s.node == self._node]
                self._end(of_node, all(s.ended for s in (makers if of_node else states[:1])))
            # Not an error that came after this rank sent its state: the others do not know it.
            if own_state.error:
                assert self._crash is not None
                raise self._crash
            if any(state.failed for state in states):
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
            for number, state in enumerate(states):
                if state.error:
                    raise LostRankError(f"{state.node}: rank {number} has failed: {state.error}")
            if states[0].over or all(state.ended for state in states):
                return

    def outcome(self) -> Any:
        """Returns the check's result or raises its FDError; returns None while the check runs."""
        return None if self._outcome is None else self._outcome.get()

    def _state(self, is_late: bool) -> tuple[_State, dict[_Name, _Made]]:
        """Returns this rank's message, and the new values that this rank has made for all ranks.

        Args:
            is_late: Whether more than `_GRACE_SECONDS` have passed since this rank heard of a
                failed check.
        """
        # Read before the values that were made: if the check has ended, these are complete.
        ended = self._outcome is not None or self._crash is not None
        with self._changed:
            unsaid, self._unsaid = self._unsaid, {}
            wanted_name = self._wanted
        for_all = {name: value for name, value in unsaid.items() if not name[1]}
        state = _State(
            self._node,
            self.leads[True],
            ended,
            "" if self._crash is None else f"{type(self._crash).__name__}: {self._crash}",
            ended and (self._outcome is None or self._outcome.error is not None),
            is_late,
            len(for_all),
            {name: value for name, value in unsaid.items() if name[1]},
            wanted_name,
        )
        return state, for_all

    def _hear(self, values: dict[_Name, _Made]) -> None:
        with self._changed:
            self._made = values | self._made
            self._changed.notify_all()

    def _take(self, name: str, value: Any) -> None:
        with self._changed:
            self._fetched[name], self._wanted = value, ""
            self._changed.notify_all()

    def _end(self, of_node: bool, ended: bool) -> None:
        with self._changed:
            self._makers_ended[of_node] |= ended
            self._changed.notify_all()


def _made_by(make: Callable[[], Any]) -> _Made:
    try:
        return _Made(make(), None)
    except FDError as error:
        return _Made(None, error)
