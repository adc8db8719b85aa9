"""The watch over the other ranks, on a store in memory; `test_lost_ranks.py` has real ranks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
from pathlib import Path

import pytest
from waiting import until

from fd_large.errors import Exit
from fd_large.ranks import failures
from fd_large.ranks.failures import Watch, write_exit_file


class Store:
    """What torch's store does, as far as it is used; `gone` stands for a server that is."""

    def __init__(self) -> None:
        self.keys: dict[str, bytes] = {}
        self.gone = False
        self._lock = threading.Lock()

    def _alive(self) -> None:
        if self.gone:
            raise RuntimeError("Connection was likely closed.")

    def set(self, key: str, value: str) -> None:
        self._alive()
        self.keys[key] = value.encode()

    def get(self, key: str) -> bytes:
        self._alive()
        return self.keys[key]

    def check(self, keys: list[str]) -> bool:
        self._alive()
        return all(key in self.keys for key in keys)

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        self._alive()
        with self._lock:
            if self.keys.get(key, b"") == expected.encode():
                self.keys[key] = desired.encode()
            return self.keys[key]


class Ranks:
    """A watch for each rank, over one store; `left` holds the exit codes that they ended with."""

    def __init__(self, number: int, neighbours: dict[int, list[int]] | None = None) -> None:
        self.store, self.left = Store(), dict[int, int]()
        self.watches = [
            Watch(
                lambda seconds: self.store,
                rank,
                number,
                meeting_seconds=20.0,
                neighbours=(neighbours or {}).get(rank, []),
                leave=lambda code, rank=rank: self.left.__setitem__(rank, code),
            )
            for rank in range(number)
        ]

    def start(self) -> Ranks:
        for watch in self.watches:
            watch.start()
        return self

    def ended(self) -> dict[int, int]:
        """The exit codes, once every thread has ended."""
        for watch in self.watches:
            watch._thread.join(20)
            assert not watch._thread.is_alive()
        return self.left


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "SECONDS_BETWEEN_LOOKS", 0.01)
    monkeypatch.setattr(failures, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(failures, "SECONDS_FOR_LAST_WORDS", 0.5)
    monkeypatch.setattr(failures, "kill_workers", lambda: None)


def test_the_first_failure_ends_all_others_with_its_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ranks = Ranks(4).start()
    ranks.watches[2].stop(2, "data.root: damaged.")
    # A consequence: it is not what the others hear.
    ranks.watches[1].stop(1, "lost a peer")
    assert ranks.ended() == {0: Exit.LOST, 3: Exit.LOST}
    assert re.search(r"rank 0 .*rank 2 .*exit code 2.*: data\.root: damaged\.", caplog.text)
    assert re.search(r"rank 3 .*rank 2 ", caplog.text)


def test_ranks_that_wait_for_a_hung_one_can_be_started_again(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FD_LARGE_EXITS", str(tmp_path))
    ranks = Ranks(2).start()
    ranks.watches[1].stop(75, "it has not moved for 600 s")
    assert ranks.ended() == {0: 75}
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text())["code"] == 75


def test_who_fails_while_a_thread_ends_the_process_waits_for_it(monkeypatch) -> None:
    going = threading.Event()
    leaver = threading.Thread(target=going.wait)
    leaver.start()
    failures.leave_to(leaver)
    fails = threading.Thread(target=failures.tell, args=(1, "a closed connection"))
    fails.start()
    fails.join(0.2)
    assert fails.is_alive()
    going.set()
    fails.join(20)
    assert not fails.is_alive()


def test_a_rank_that_ends_by_itself_in_the_grace_keeps_its_exit_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(failures, "GRACE_SECONDS", 20.0)
    ranks = Ranks(3).start()
    ranks.watches[1].stop(2, "out of memory")
    until(lambda: ranks.store.check(["left/0", "left/2"]), 20, "ranks 0 and 2 say that they leave")
    assert ranks.watches[0].heard() == (1, 2, "out of memory")
    for rank in (0, 2):
        ranks.watches[rank].stop(1, "lost a peer")
    assert ranks.ended() == {}


def test_the_loss_of_the_store_is_the_loss_of_rank_0(caplog: pytest.LogCaptureFixture) -> None:
    ranks = Ranks(3)
    ranks.watches[0]._over.set()  # It holds the store.
    ranks.start()
    ranks.store.gone = True
    assert ranks.ended() == {1: Exit.LOST, 2: Exit.LOST}
    assert re.search(r"rank 1 .*rank 0 .*exit code 1.*node", caplog.text)


def test_a_connection_that_breaks_ends_nobody() -> None:
    ranks = Ranks(2).start()
    until(lambda: ranks.store.check(["process/0", "process/1"]), 20, "both ranks say who they are")
    broken, calls = threading.Event(), []

    def once(keys: list[str]) -> bool:
        calls.append(keys)
        if not broken.is_set():
            broken.set()
            raise RuntimeError("Connection reset by peer")
        return Store.check(ranks.store, keys)

    ranks.store.check = once  # type: ignore[method-assign]
    until(lambda: len(calls) > 4, 20, "looks after the connection broke")
    for watch in reversed(ranks.watches):
        watch.stop()
    assert ranks.ended() == {}


def test_rank_0_that_has_done_its_work_ends_nobody() -> None:
    ranks = Ranks(3).start()
    ranks.watches[0].stop()
    # Before it closed the store, the others knew.
    assert ranks.store.check(["left/1", "left/2"])
    ranks.store.gone = True
    assert ranks.ended() == {}


def test_a_rank_that_has_finished_early_ends_nobody() -> None:
    child = subprocess.Popen(["sleep", "60"])
    ranks = Ranks(3, {1: [2], 0: [2]})
    ranks.store.set("process/2", json.dumps([*failures._this_process()[:-1], child.pid]))
    ranks.watches[2] = ranks.watches[1]  # The process stands for it.
    for watch in ranks.watches[:2]:
        watch.start()
    until(lambda: all(watch._neighbours.get(2) for watch in ranks.watches), 20, "all watch rank 2")
    ranks.store.set("left/2", "")
    child.kill()
    child.wait()
    until(
        lambda: not any(watch._neighbours for watch in ranks.watches), 20, "nobody watches rank 2"
    )
    for watch in ranks.watches[:2]:
        watch.stop()
    assert ranks.ended() == {}


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs pidfd_open")
def test_a_rank_of_this_node_that_was_killed_is_missed(caplog: pytest.LogCaptureFixture) -> None:
    child = subprocess.Popen(["sleep", "60"])
    ranks = Ranks(2, {0: [7]})
    ranks.store.set("process/7", json.dumps([*failures._this_process()[:-1], child.pid]))
    ranks.start()
    until(lambda: ranks.watches[0]._neighbours[7], 20, "rank 0 watches rank 7")
    child.kill()
    assert ranks.ended() == {0: Exit.LOST, 1: Exit.LOST}
    # Rank 1, of another node, hears it from rank 0.
    assert re.search(r"rank 1 .*rank 7 .*exit code 1.*killed", caplog.text)
    child.wait()


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs pidfd_open")
def test_a_rank_that_was_killed_before_it_was_looked_at_is_missed() -> None:
    child = subprocess.Popen(["sleep", "60"])
    child.kill()
    child.wait()
    ranks = Ranks(2, {0: [7]})
    ranks.store.set("process/7", json.dumps([*failures._this_process()[:-1], child.pid]))
    assert ranks.start().ended() == {0: Exit.LOST, 1: Exit.LOST}


def test_processes_of_another_container_are_not_looked_at() -> None:
    ranks = Ranks(2, {0: [1]})
    ranks.store.set("process/1", json.dumps(["another kernel", "pid:[1]", 1]))
    ranks.watches[0].start()
    until(lambda: not ranks.watches[0]._neighbours, 20, "rank 0 watches nobody")
    ranks.watches[0].stop()
    assert ranks.left == {}


def test_a_store_that_does_not_answer_keeps_no_rank_from_leaving() -> None:
    ranks, answers = Ranks(2), threading.Event()
    ranks.store.check = lambda keys: answers.wait(60)  # type: ignore[method-assign]
    ranks.start()
    ranks.watches[0].stop(2, "x")
    assert not answers.is_set()
    ranks.watches[1]._over.set()
    answers.set()


def test_a_disk_that_hangs_keeps_no_rank_from_telling_the_others(monkeypatch) -> None:
    answers = threading.Event()
    monkeypatch.setattr(failures, "write_exit_file", lambda *given: answers.wait(60))
    ranks = Ranks(2).start()
    monkeypatch.setattr(failures, "_watch", ranks.watches[1])
    monkeypatch.setattr(failures, "_leaver", None)
    failures.tell(2, "x")
    assert not answers.is_set()
    until(lambda: ranks.left == {0: Exit.LOST}, 20, lambda: f"rank 0 is told: {ranks.left}")
    answers.set()


def test_the_exit_file_keeps_what_came_first(tmp_path: Path) -> None:
    write_exit_file(2, "x", {"RANK": "3"})
    given = {"FD_LARGE_EXITS": str(tmp_path), "RANK": "3"}
    write_exit_file(2, "data.root: damaged.", given)
    write_exit_file(1, "a consequence", given)
    (file,) = tmp_path.iterdir()
    assert file.name == "rank_3.json"
    assert json.loads(file.read_text()) == {"code": 2, "reason": "data.root: damaged."}
    write_exit_file(2, "x", given | {"FD_LARGE_EXITS": "/proc/no/such"})


def test_the_reason_is_told_before_a_rank_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "GRACE_SECONDS", 0.1)
    monkeypatch.setattr(failures, "SECONDS_FOR_LAST_WORDS", 20.0)  # On busy cores.
    told: list[str] = []
    monkeypatch.setattr(failures, "last_words", [told.append])
    ranks = Ranks(2).start()
    ranks.watches[1].stop(2, "out of memory")
    assert ranks.ended() == {0: Exit.LOST}
    assert told == ["rank 1 has failed (exit code 2): out of memory"]


@pytest.mark.parametrize(
    "text", ["", "{}", "[1, 2]", '[1, 2, {"a": 1}]', '["1", 2, "x"]', "[" * 100_000, "\udc80"]
)
def test_what_no_rank_wrote_ends_the_ranks_and_not_the_watch_alone(
    text: str, caplog: pytest.LogCaptureFixture
) -> None:
    ranks = Ranks(2).start()
    ranks.store.keys["end"] = text.encode(errors="surrogateescape")
    assert ranks.ended() == {0: Exit.LOST, 1: Exit.LOST}
    assert "holds an entry that no rank wrote" in caplog.text


def test_escape_sequences_in_the_store_reach_no_terminal(caplog: pytest.LogCaptureFixture) -> None:
    ranks = Ranks(2).start()
    ranks.store.set("end", json.dumps([1, 2, "\x1b]0;x\x07"]))
    assert ranks.ended() == {0: Exit.LOST, 1: Exit.LOST}
    assert caplog.text.replace("\n", "").isprintable()


@pytest.mark.parametrize("text", ["{}", "[1]", '["a", "b", "c"]', "null", "[" * 100_000])
def test_a_neighbour_that_is_named_by_no_rank_is_not_watched(text: str) -> None:
    ranks = Ranks(2, {0: [1]})
    ranks.store.set("process/1", text)
    ranks.watches[0].start()
    until(lambda: not ranks.watches[0]._neighbours or ranks.left, 20, "the neighbour is left out")
    assert ranks.left == {}
    ranks.watches[0].stop()


@pytest.mark.parametrize(
    ("lost", "rank", "local_rank", "speaks"),
    [(0, 1, 1, True), (0, 2, 2, False), (0, 8, 0, True), (0, 9, 1, False), (2, 1, 1, False)],
)
def test_one_rank_of_a_node_speaks_for_rank_0(
    lost: int, rank: int, local_rank: int, speaks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    assert failures.speaks_for(failures.Ending(lost, 1, "")) is speaks
    assert failures.speaks_for(None) is False


def test_a_store_that_is_gone_is_heard_of_as_the_end_of_rank_0() -> None:
    ranks = Ranks(2).start()
    watch = ranks.watches[1]
    until(lambda: watch._store is not None, 20, "rank 1 watches")
    assert watch.heard() is None
    ranks.store.gone = True
    heard = watch.heard()
    assert heard is not None
    assert (heard.rank, heard.code) == (0, Exit.LOST)
    assert ranks.ended() == {0: 1, 1: 1}


def test_a_reason_that_is_known_stays_where_the_store_goes_with_rank_0() -> None:
    ranks = Ranks(2).start()
    watch = ranks.watches[1]
    until(lambda: watch._store is not None, 20, "rank 1 watches")
    ranks.store.compare_set("end", "", '[0, 3, "the file was cut"]')
    until(lambda: watch._known is not None, 20, "rank 1 hears of it")
    ranks.store.gone = True
    assert watch.heard() == (0, 3, "the file was cut")
